//! The key that is this device.

use iroh::SecretKey;
use vfs_core::model::DeviceId;

/// The device whose secret key this is; needed before a [`Node`](crate::Node) runs.
pub fn device_id(secret_key: &[u8; 32]) -> DeviceId {
    DeviceId(*SecretKey::from_bytes(secret_key).public().as_bytes())
}

//! Telling the kernel that something it caches is no longer so.
//!
//! `fuser` 0.18 has a notifier, but without the two notifications that this
//! drive needs most, so the messages (`fs/fuse/dev.c`, `fuse_notify`) are
//! written here:
//!
//! * **expire** (ABI 7.38) instead of invalidate: the name is looked up again
//!   at its next use. Plain invalidation drops the name at once, which turns
//!   the working directory of a shell into "(deleted)" and detaches mounts
//!   below it, although the directory may be as it was.
//! * **new epoch** (ABI 7.44): every name is looked up again at its next use.
//!   Without it there is no way to name everything that the kernel knows.
//!
//! A notification may wait for a lock that is held by a request in progress;
//! so it is never sent from within a request.

use crate::mounts::DeviceNo;
use fuser::Version;
use rustix::io::Errno;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Weak;

const INVAL_INODE: i32 = 2;
const INVAL_ENTRY: i32 = 3;
const INC_EPOCH: i32 = 8;
const EXPIRE_ONLY: u32 = 1;

const EXPIRE_SINCE: Version = Version(7, 38);
const EPOCH_SINCE: Version = Version(7, 44);

/// Whether the kernel can be told to look up every name again.
pub(crate) fn has_epochs(abi: Version) -> bool {
    abi >= EPOCH_SINCE
}

/// The kernel's end of one mount. The device is held weakly: the last strong reference goes
/// with the session, and with it the connection, so that no request waits for a dead session.
pub(crate) struct Kernel {
    device: Weak<OwnedFd>,
    abi: Version,
    mount: Option<DeviceNo>,
}

impl Kernel {
    pub(crate) fn new(device: Weak<OwnedFd>, abi: Version, mount: Option<DeviceNo>) -> Self {
        Self { device, abi, mount }
    }

    /// Whether a name that is told goes at once, and with it what is mounted on it or below.
    pub(crate) fn drops_names(&self) -> bool {
        self.abi < EXPIRE_SINCE
    }

    /// The name `name` of the directory `parent` may now be another file, or none.
    pub(crate) fn expire_entry(&self, parent: u64, name: &[u8]) {
        let Ok(name_len) = u32::try_from(name.len()) else { return };
        let flags = if self.drops_names() { 0 } else { EXPIRE_ONLY };
        let mut body = [0; 16];
        body[..8].copy_from_slice(&parent.to_ne_bytes());
        body[8..12].copy_from_slice(&name_len.to_ne_bytes());
        body[12..].copy_from_slice(&flags.to_ne_bytes());
        self.send(INVAL_ENTRY, &[&body, name, &[0]]);
    }

    /// The attributes of an inode changed; its pages stay.
    pub(crate) fn expire_attributes(&self, ino: u64) {
        self.inval_inode(ino, -1);
    }

    /// Attributes and pages of an inode changed; a directory's pages are its cached listing.
    pub(crate) fn drop_pages(&self, ino: u64) {
        self.inval_inode(ino, 0);
    }

    /// The same of a file, with the pages from this byte on only. It waits for those that are just
    /// being read.
    pub(crate) fn drop_pages_from(&self, ino: u64, from: u64) {
        self.inval_inode(ino, i64::try_from(from).unwrap_or(i64::MAX));
    }

    /// Any name may have changed. On kernels without epochs nothing can be sent; there the
    /// cache times are bounded instead ([`crate::adapter`]).
    pub(crate) fn expire_everything(&self) {
        if has_epochs(self.abi) {
            self.send(INC_EPOCH, &[]);
        }
        // The root has no name that could be looked up again.
        self.drop_pages(fuser::INodeNo::ROOT.0);
    }

    fn inval_inode(&self, ino: u64, offset: i64) {
        let mut body = [0; 24];
        body[..8].copy_from_slice(&ino.to_ne_bytes());
        body[8..16].copy_from_slice(&offset.to_ne_bytes());
        self.send(INVAL_INODE, &[&body]);
    }

    fn send(&self, code: i32, parts: &[&[u8]]) {
        let Some(device) = self.device.upgrade() else { return };
        let message = message(code, parts);
        match rustix::io::writev(&device, &[IoSlice::new(&message)]) {
            // Unknown to the kernel, or dropped meanwhile: nothing stale is cached.
            Ok(_) | Err(Errno::NOENT) => {}
            // Unmounted meanwhile.
            Err(Errno::NODEV | Errno::PERM | Errno::NOTCONN) => {}
            Err(error) => {
                let mount = self.mount.map(|m| m.to_string());
                tracing::warn!(%error, code, mount, "the kernel refused an invalidation");
            }
        }
    }
}

/// `struct fuse_out_header` with unique 0, which marks a notification, and the parts after it.
fn message(code: i32, parts: &[&[u8]]) -> Vec<u8> {
    const HEADER_BYTES: usize = 16;
    let total = HEADER_BYTES + parts.iter().map(|p| p.len()).sum::<usize>();
    let mut message = Vec::with_capacity(total);
    message.extend_from_slice(&(total as u32).to_ne_bytes());
    message.extend_from_slice(&code.to_ne_bytes());
    message.extend_from_slice(&0u64.to_ne_bytes());
    parts.iter().for_each(|part| message.extend_from_slice(part));
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    fn sent(abi: Version, act: impl FnOnce(&Kernel)) -> Vec<u8> {
        let (ours, mut kernels) = UnixStream::pair().unwrap();
        let device = Arc::new(OwnedFd::from(ours));
        act(&Kernel::new(Arc::downgrade(&device), abi, None));
        drop(device);
        let mut bytes = Vec::new();
        kernels.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn an_expired_entry_has_length_code_flag_and_nul() {
        let bytes = sent(Version(7, 40), |k| k.expire_entry(5, b"name"));
        assert_eq!(bytes.len(), 16 + 16 + 5);
        assert_eq!(u32_at(&bytes, 0) as usize, bytes.len());
        assert_eq!(u32_at(&bytes, 4), 3);
        assert_eq!(u32_at(&bytes, 24), 4);
        assert_eq!(u32_at(&bytes, 28), EXPIRE_ONLY);
        assert_eq!(&bytes[32..], b"name\0");
    }

    #[test]
    fn an_old_kernel_is_not_sent_what_it_does_not_know() {
        let bytes = sent(Version(7, 34), |k| k.expire_entry(5, b"name"));
        assert_eq!(u32_at(&bytes, 28), 0);
        let bytes = sent(Version(7, 34), Kernel::expire_everything);
        assert_eq!(u32_at(&bytes, 4), INVAL_INODE as u32);
    }

    #[test]
    fn after_the_session_nothing_is_sent() {
        let kernel = Kernel::new(Weak::new(), EPOCH_SINCE, None);
        kernel.expire_everything();
        kernel.expire_entry(1, b"x");
    }
}

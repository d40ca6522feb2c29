//! Hash trees, the content cache and the read plan.

pub mod manifest;
pub mod manifests;

pub use manifest::Manifest;
pub use manifests::Manifests;

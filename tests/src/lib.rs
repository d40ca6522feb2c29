//! What the end-to-end tests share: devices with real daemons, a link between them, waiting.
//!
//! Nothing is imitated: a [`Device`] is a data directory and an `sd daemon run`, a [`Lab`] is two
//! network namespaces with a real link, mounts are the kernel's. Everything made is removed again
//! when the value is dropped, also by a failing test; a failing test prints the daemons' logs.
//!
//! A test takes the whole machine ([`mod@machine`]) and says what it needs of it; where that is
//! missing it is skipped, or fails with `SD_TEST_REQUIRE=all`.

pub mod device;
pub mod disk;
pub mod files;
pub mod lab;
pub mod locker;
pub mod machine;
pub mod peer;
pub mod proc;
pub mod star;
pub mod wait;

pub use device::Device;
pub use lab::{Lab, Link};
pub use machine::{Machine, Need, machine};
pub use star::Star;

//! The drive through a real mount. One program, so that it is linked once.

mod common;
mod events;
mod files;
mod growth;
mod remote;
mod session;
mod writes;

//! The drive as a person has it: real daemons, real mounts, a real link.
#![allow(missing_docs)]

mod bad_input;
mod bytes;
mod coherence;
mod conflicts;
mod crowds;
mod doctor;
mod events;
mod gone_owner;
mod growth;
mod guard;
mod holders;
mod kills;
mod liar;
mod live;
mod locks;
mod mend;
mod names;
mod obstacles;
mod own_files;
mod pins;
mod scale;
mod steps;
mod strangers;
mod tree;
mod writing;

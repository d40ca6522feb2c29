//! How the C library keeps what was freed.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// glibc keeps freed memory apart in up to eight arenas for each processor, and the daemon's work
/// goes from thread to thread: with them it holds up to twice as much (docs/decisions/0007-arenas.md).
const FEW_ARENAS: (&str, &str) = ("MALLOC_ARENA_MAX", "2");
/// Set beside it: the loader takes the first away from a program that has rights of its file.
const BEGUN_AGAIN: (&str, &str) = ("SD_BEGUN_AGAIN", "1");

/// Begins again as the same process, with few arenas: they are chosen before `main`.
///
/// Returns when they were chosen already, here or by who started the daemon, and when it cannot
/// begin again; then more memory is used.
pub fn take_few() -> io::Result<()> {
    let is_set = |(name, _): (&str, &str)| std::env::var_os(name).is_some();
    if cfg!(not(target_env = "gnu")) || is_set(FEW_ARENAS) || is_set(BEGUN_AGAIN) {
        return Ok(());
    }
    let mut again = Command::new(std::env::current_exe()?);
    again.args(std::env::args_os().skip(1)).envs([FEW_ARENAS, BEGUN_AGAIN]);
    Err(again.exec())
}

//! A program's locks in the drive's words.

use fuser::LockOwner;
use vfs_core::drive::{HandleId, LockOf};
use vfs_core::error::{FsError, FsResult, Kind as ErrorKind};
use vfs_core::locks::{Ask, Holder, Mode, Span};

/// `l_type` of `struct flock`, as `<asm-generic/fcntl.h>` numbers them.
const F_RDLCK: i32 = 0;
const F_WRLCK: i32 = 1;
const F_UNLCK: i32 = 2;

/// The mode asked for; `None` gives back.
pub(crate) fn mode(l_type: i32) -> FsResult<Option<Mode>> {
    match l_type {
        F_RDLCK => Ok(Some(Mode::Shared)),
        F_WRLCK => Ok(Some(Mode::Exclusive)),
        F_UNLCK => Ok(None),
        _ => Err(FsError::new(ErrorKind::Invalid, "lock in an unknown way")),
    }
}

/// The reverse of [`mode`].
pub(crate) fn l_type(mode: Option<Mode>) -> i32 {
    match mode {
        Some(Mode::Shared) => F_RDLCK,
        Some(Mode::Exclusive) => F_WRLCK,
        None => F_UNLCK,
    }
}

/// What a request of the kernel asks for.
pub(crate) fn lock_of(
    handle: HandleId,
    owner: LockOwner,
    (first, last): (u64, u64),
    mode: Option<Mode>,
    pid: u32,
) -> FsResult<LockOf> {
    let span = Span::new(first, last);
    let span = span.ok_or_else(|| FsError::new(ErrorKind::Invalid, "lock a senseless range"))?;
    Ok(LockOf { handle, ask: Ask { holder: Holder(owner.0), pid, span, mode } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_may_send_is_taken_apart() {
        for mode_asked in [None, Some(Mode::Shared), Some(Mode::Exclusive)] {
            assert_eq!(mode(l_type(mode_asked)).unwrap(), mode_asked);
        }
        assert!(mode(3).is_err());
        let owner = LockOwner(1);
        let lock = |range| lock_of(HandleId(1), owner, range, None, 1);
        assert!(lock((0, i64::MAX as u64)).is_ok());
        assert!(lock((0, u64::MAX)).is_err() && lock((2, 1)).is_err());
    }
}

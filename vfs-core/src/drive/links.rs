//! Which symbolic links of other devices are shown.
//!
//! A link's text is followed by *this* device's kernel: a peer's `/etc/passwd`,
//! or `../../../../home/me/.ssh/id_ed25519`, would lead a program that copies a
//! remote folder to this device's own files. By default the target of such a
//! link cannot be read.
//!
//! A link is contained when its text has no NUL, at which the kernel would end it,
//! is relative, and every `..` stands before the first name, and there are no more of them than the link's directory lies
//! below its location. The order matters: `..` after a name may follow another
//! link to somewhere else first, so text alone cannot tell where it leads. A
//! leading `..` starts from the link's own directory, which is no link; after
//! it the walk only descends, or follows a link that is checked in its turn.
//! The depth is part of the link's inode number ([`super::inode`]), so a peer
//! that moves the link between the check and the walk gains nothing.

/// What `readlink` gives for another device's link that leads out of its location.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ForeignSymlinks {
    /// `EPERM`: a peer's link never leads into this device's files.
    #[default]
    Contained,
    /// The owner's text, as it is.
    AsIs,
}

/// Whether a link in a directory `depth` levels below its location's folder stays inside.
pub(super) fn is_contained(target: &[u8], depth: usize) -> bool {
    // The kernel ends the text at a NUL: what it follows is not what is judged here.
    if target.first() == Some(&b'/') || target.contains(&0) {
        return false;
    }
    let mut parts = target.split(|b| *b == b'/').filter(|p| !matches!(*p, b"" | b"."));
    let ups = parts.by_ref().take_while(|p| *p == b"..").count();
    ups <= depth && parts.all(|p| p != b"..")
}

#[cfg(test)]
mod tests {
    use super::is_contained;

    #[test]
    fn links_inside_are_contained() {
        for (target, depth) in [
            ("a", 0),
            ("./a", 0),
            ("a/b/", 0),
            (".", 0),
            ("../a", 1),
            ("..", 1),
            ("./.././../x", 2),
        ] {
            assert!(is_contained(target.as_bytes(), depth), "{target}");
        }
    }

    #[test]
    fn links_that_may_lead_out_are_not() {
        for (target, depth) in [
            ("/etc/passwd", 9),
            ("..", 0),
            ("../../a", 1),
            ("a/..", 5),
            ("../a/../b", 5),
            ("./a/./../../..", 2),
            ("..\0", 0),
            ("a/..\0", 5),
            ("../..\0x", 1),
            ("a\0", 5),
        ] {
            assert!(!is_contained(target.as_bytes(), depth), "{target}");
        }
    }
}

//! Whether what lies on the disk can be believed after a restart.

use std::fs;
use std::path::Path;

/// The `boot` file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Boot {
    /// Closed in order, everything synced.
    Closed,
    /// In use by, or killed under, the kernel that runs now.
    Running,
    /// In use when the machine crashed; or never.
    Crashed,
}

impl Boot {
    pub(super) fn read(dir: &Path) -> Self {
        let text = fs::read_to_string(dir.join("boot")).unwrap_or_default();
        match text {
            text if text == Self::Closed.text() => Self::Closed,
            text if boot_id().is_some() && text == Self::Running.text() => Self::Running,
            _ => Self::Crashed,
        }
    }

    pub(super) fn is_trustworthy(self) -> bool {
        self != Self::Crashed
    }

    pub(super) fn text(self) -> String {
        match self {
            Self::Running => format!("1\n{}\n", boot_id().unwrap_or_default()),
            Self::Closed | Self::Crashed => "1\nclosed\n".into(),
        }
    }
}

fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

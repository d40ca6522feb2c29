//! What is shown while a command waits for devices.

use crate::output::{Output, printable};
use indicatif::ProgressBar;

/// A line that shows how far it is, and which devices cannot be reached; gone when it is dropped.
pub struct Waiting<'a> {
    out: &'a Output,
    bar: ProgressBar,
    told: Vec<String>,
}

impl<'a> Waiting<'a> {
    pub fn begin(out: &'a Output) -> Self {
        Self { out, bar: out.spinner(), told: Vec::new() }
    }

    pub fn show(&mut self, mut words: String, offline: Vec<String>) {
        if !offline.is_empty() {
            let names: Vec<_> = offline.iter().map(|n| format!("“{}”", printable(n))).collect();
            words += &format!("; {} cannot be reached", names.join(", "));
        }
        self.bar.set_message(words);
        // Once a device, so that a wait without an end is understood in a log as well.
        for device in offline {
            if !self.told.contains(&device) {
                let note = || self.out.note(format_args!("waiting for “{}”", printable(&device)));
                self.bar.suspend(note);
                self.told.push(device);
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

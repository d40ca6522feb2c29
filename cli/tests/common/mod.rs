//! One device on this machine, driven by its command line.
// Each test file is a program of its own and uses a part of this.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// A device with a data directory of its own; its daemon ends when this is dropped.
pub struct Device {
    home: TempDir,
    data: PathBuf,
}

impl Device {
    pub fn new() -> Self {
        Self::below("data")
    }

    /// With a data directory of this path, below a temporary one.
    pub fn below(path: impl AsRef<Path>) -> Self {
        let home = TempDir::new().unwrap();
        let data = home.path().canonicalize().unwrap().join(path);
        Self { home, data }
    }

    /// With a library already.
    pub fn with_library(name: &str) -> Self {
        let device = Self::new();
        device.ok(&["library", "create", "home", "--device-name", name]);
        device
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A folder of this name beside the data directory.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.home.path().canonicalize().unwrap().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    pub fn command(&self) -> Command {
        self.command_by(&[])
    }

    /// By another program, which is given the path of `sd` and then the arguments.
    pub fn command_by(&self, starter: &[&str]) -> Command {
        let words = [starter, &[env!("CARGO_BIN_EXE_sd")]].concat();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .env("SD_DATA_DIR", &self.data)
            .env("HOME", self.home.path())
            .env("SD_NETWORK_BIND", "127.0.0.1:0")
            .env("SD_NETWORK_DISCOVERY", "false")
            .stdin(Stdio::null());
        command
    }

    pub fn run<A: AsRef<OsStr>>(&self, args: &[A]) -> Output {
        self.command().args(args).output().unwrap()
    }

    /// Must succeed; gives stdout.
    #[track_caller]
    pub fn ok<A: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[A]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "sd {args:?}: {}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Must succeed with `--json`; gives the document.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("sd {args:?}: {e}: {text}"))
    }

    /// Must fail with this code, say nothing on stdout, and on stderr an error that contains
    /// each of these words and a hint; gives stderr.
    #[track_caller]
    pub fn fails<A: AsRef<OsStr> + std::fmt::Debug>(
        &self,
        code: i32,
        args: &[A],
        words: &[&str],
    ) -> String {
        let output = self.run(args);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "sd {args:?}: {text}");
        assert!(output.stdout.is_empty(), "sd {args:?}: data in spite of an error");
        assert!(text.contains("error:"), "sd {args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "sd {args:?}: no “{word}” in: {text}");
        }
        // clap words its own tips.
        assert!(code == 2 || text.contains("hint:"), "sd {args:?}: no hint: {text}");
        text
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.data.join("daemon.lock").exists() {
            self.run(&["daemon", "stop", "--force"]);
        }
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.data.join("sd.log")).unwrap_or_default();
            eprintln!("---- {}\n{log}", self.data.display());
        }
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A path as an argument among words.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

//! The daemon's log: to the terminal in the foreground, else to `sd.log`, which
//! is bounded: when it is full it becomes `sd.log.1`, replacing the one before.

use super::LogTo;
use crate::data_dir::DataDir;
use crate::failure::{Code, Failure, Outcome};
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Mutex;
use tracing_subscriber::EnvFilter;

/// The log and the one before it take at most twice this.
const MAX_BYTES: u64 = 8 << 20;

/// Everything logged by this process from now on goes there; so do panics.
pub fn start(dir: &DataDir, filter: &str, to: LogTo) -> Outcome<()> {
    let filter: EnvFilter = filter
        .parse()
        .map_err(|e| Failure::new(Code::Invalid, format!("log.level “{filter}”: {e}")))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    let started = match to {
        LogTo::Stderr => {
            let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            builder.with_writer(io::stderr).with_ansi(colour).try_init()
        }
        LogTo::File => {
            let log = Rotating::open(dir.log())
                .map_err(|e| Failure::io(format!("cannot write {}", dir.log().display()), e))?;
            builder.with_writer(Mutex::new(log)).with_ansi(false).try_init()
        }
    };
    started.map_err(|e| Failure::new(Code::Internal, e.to_string()))?;
    std::panic::set_hook(Box::new(|panic| tracing::error!("a bug: {panic}")));
    Ok(())
}

struct Rotating {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Rotating {
    fn open(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes })
    }

    fn rotate(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, self.path.with_extension("log.1"))?;
        *self = Self::open(self.path.clone())?;
        Ok(())
    }
}

impl Write for Rotating {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes >= MAX_BYTES {
            self.rotate()?;
        }
        let written = self.file.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sd.log");
        let mut log = Rotating::open(path.clone()).unwrap();
        let line = [b'x'; 64 << 10];
        for _ in 0..3 * MAX_BYTES / line.len() as u64 {
            log.write_all(&line).unwrap();
        }
        let size = |p: &std::path::Path| std::fs::metadata(p).unwrap().len();
        assert!(size(&path) <= MAX_BYTES + line.len() as u64);
        assert!(size(&path.with_extension("log.1")) <= MAX_BYTES + line.len() as u64);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

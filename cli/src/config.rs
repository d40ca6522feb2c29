//! Configuration: one TOML file in the data directory, one table of keys here.
//!
//! Every key has a default, and is overridden by the file, then by the
//! environment (`SD_<SECTION>_<KEY>`), then by `--set KEY=VALUE`.
//! `docs/CONFIG.md` is generated from [`KEYS`].

use crate::failure::{Code, Failure, Outcome, nearest};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use toml_edit::{Array, DocumentMut, Item, Table, Value};
use vfs_core::hydration::{HydrationConfig, Mode, Purpose};

/// What a key's value looks like.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// Socket addresses, separated by commas; a TOML array in the file.
    Addresses,
    /// Any text; empty is none.
    Text,
    /// `true` or `false`.
    Bool,
    /// Bytes, such as `20 GiB`; or `auto`.
    Size,
    /// Such as `10s` or `5m`.
    Duration,
    /// A whole number; 0 lets the program choose.
    Count { max: u64 },
    /// One of these words.
    Word(&'static [&'static str]),
    /// Programs and what they are for, as `my-backup=backup, tumblerd=none`.
    Programs,
    /// Filters of the log, as `info` or `sync=debug,info`.
    LogFilter,
}

/// What `hydrate.*` may be set to, by purpose.
const MODES: &[&str] = &["whole", "exact", "small", "refuse"];

/// One configuration key.
#[derive(Debug)]
pub struct Key {
    /// `section.key`.
    pub name: &'static str,
    /// Its value when nothing sets it.
    pub default: &'static str,
    /// What it does.
    pub about: &'static str,
    form: Form,
}

/// Every key, in the order of the documentation.
pub const KEYS: &[Key] = &[
    Key {
        name: "network.bind",
        default: "[::]:0,0.0.0.0:0",
        about: "UDP addresses to listen on; port 0 lets the system choose a free one",
        form: Form::Addresses,
    },
    Key {
        name: "network.relay",
        default: "",
        about: "URL of a relay for devices without a direct path to each other; empty uses none",
        form: Form::Text,
    },
    Key {
        name: "network.discovery",
        default: "true",
        about: "find the library's devices on the local network by mDNS",
        form: Form::Bool,
    },
    Key {
        name: "cache.limit",
        default: "auto",
        about: "most bytes of other devices' files kept here, such as 20GiB; \
                auto is a tenth of the disk, at most 50 GiB",
        form: Form::Size,
    },
    Key {
        name: "cache.min_free",
        default: "auto",
        about: "bytes of its disk that the cache leaves free: it gives back what was not used for the \
                longest time, and then keeps nothing new; auto is a fiftieth of the disk, at least \
                512 MiB (of a small disk a tenth) and at most 4 GiB",
        form: Form::Size,
    },
    Key {
        name: "staging.min_free",
        default: "auto",
        about: "bytes of the disk that are left free when programs write to other devices' files; \
                a write that would leave less fails with “No space left on device”; auto is 256 MiB",
        form: Form::Size,
    },
    Key {
        name: "read.deadline",
        default: "10s",
        about: "how long a read of bytes that are not here may wait before it fails with “Host is down”, \
                and a write to an `O_SYNC` file for its owner before it is content with this disk",
        form: Form::Duration,
    },
    Key {
        name: "hydrate.thumbnails",
        default: "small",
        about: "what programs that make thumbnails get of other devices' files that are not here: \
                whole: as every program; exact: what they read and nothing ahead of it; \
                small: files up to 256 KiB, others cannot be opened; refuse: none can be opened",
        form: Form::Word(MODES),
    },
    Key {
        name: "hydrate.indexing",
        default: "refuse",
        about: "the same for programs that index what is in files; names, sizes and times are always given",
        form: Form::Word(MODES),
    },
    Key {
        name: "hydrate.backup",
        default: "exact",
        about: "the same for programs that make backups; with small or refuse a backup of the drive has gaps",
        form: Form::Word(MODES),
    },
    Key {
        name: "hydrate.programs",
        default: "",
        about: "more such programs, by the name of their file, and what they are for, such as \
                photo-wall=thumbnails, my-copy=backup (thumbnails, indexing or backup); none is for a \
                program that is to get everything, such as tumblerd=none",
        form: Form::Programs,
    },
    Key {
        name: "index.scan_threads",
        default: "0",
        about: "threads that scan locations; 0 chooses by the number of processors",
        form: Form::Count { max: 64 },
    },
    Key {
        name: "index.hash",
        default: "true",
        about: "hash files in the background; without it reads by other devices are not checked against a hash",
        form: Form::Bool,
    },
    Key {
        name: "index.hash_threads",
        default: "0",
        about: "threads that hash files; 0 chooses by the number of processors",
        form: Form::Count { max: 64 },
    },
    Key {
        name: "index.watches",
        default: "0",
        about: "how many directories are watched one by one; of a location with more the whole file \
                system is watched instead, if this program may (as root, on ext4, XFS, Btrfs or F2FS); \
                0 chooses 16,384",
        form: Form::Count { max: 1 << 30 },
    },
    Key {
        name: "index.rescan_after",
        default: "60s",
        about: "how long after a whole scan a location that cannot be fully watched is scanned again; \
                more after a scan that took long, so that scanning takes at most a tenth of the time",
        form: Form::Duration,
    },
    Key {
        name: "mount.passthrough",
        default: "auto",
        about: "let the kernel read and write complete local files without this program; \
                auto uses it where kernel and rights allow",
        form: Form::Word(&["auto", "off"]),
    },
    Key {
        name: "mount.threads",
        default: "0",
        about: "threads that answer the kernel, for each mount; 0 chooses by the number of processors",
        form: Form::Count { max: 64 },
    },
    Key {
        name: "mount.events",
        default: "auto",
        about: "auto: programs that watch a folder of the drive (inotify) are told of changes made \
                on other devices; off: only of those made through the mount",
        form: Form::Word(&["auto", "off"]),
    },
    Key {
        name: "mount.foreign_symlinks",
        default: "contained",
        about: "contained: another device's link that leads out of its location cannot be followed; \
                as_is: it leads to whatever this device has there",
        form: Form::Word(&["contained", "as_is"]),
    },
    Key {
        name: "log.level",
        default: "info",
        about: "error, warn, info, debug or trace; also by part, such as sync=debug,info",
        form: Form::LogFilter,
    },
];

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    Default,
    File,
    Environment,
    Flag,
}

impl Source {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::File => "file",
            Self::Environment => "environment",
            Self::Flag => "flag",
        }
    }
}

/// The value of every key, checked.
#[derive(Clone, Debug)]
pub struct Config {
    values: Vec<(&'static Key, String, Source)>,
}

impl Config {
    /// File, environment and flags, over the defaults.
    pub fn load(file: &Path, flags: &[String]) -> Outcome<Self> {
        Self::resolve(&read_document(file)?, file, |name| std::env::var(name).ok(), flags)
    }

    fn resolve(
        document: &DocumentMut,
        file: &Path,
        environment: impl Fn(&str) -> Option<String>,
        flags: &[String],
    ) -> Outcome<Self> {
        let mut values: Vec<_> =
            KEYS.iter().map(|k| (k, k.default.to_owned(), Source::Default)).collect();
        let mut set = |key: &'static Key, text: String, source: Source| {
            let slot = values.iter_mut().find(|(k, ..)| k.name == key.name);
            *slot.expect("every key has a slot") = (key, text, source);
        };
        for (key, text) in entries_of(document, file)? {
            set(key, text, Source::File);
        }
        for key in KEYS {
            let variable = variable_of(key.name);
            if let Some(text) = environment(&variable) {
                key.check(&text).map_err(|e| e.at(&variable, Code::Invalid))?;
                set(key, text, Source::Environment);
            }
        }
        for flag in flags {
            let (name, text) = flag.split_once('=').ok_or_else(|| {
                Failure::new(Code::Usage, format!("--set {flag}: not KEY=VALUE"))
                    .hint("for example --set cache.limit=20GiB")
            })?;
            let key = key(name)?;
            key.check(text).map_err(|e| e.at(&format!("--set {name}"), Code::Usage))?;
            set(key, text.to_owned(), Source::Flag);
        }
        Ok(Self { values })
    }

    /// Key, value and source of everything.
    pub fn iter(&self) -> impl Iterator<Item = (&'static Key, &str, Source)> {
        self.values.iter().map(|(k, v, s)| (*k, v.as_str(), *s))
    }

    /// The text of a value.
    pub fn get(&self, name: &str) -> Outcome<&str> {
        let key = key(name)?;
        Ok(self.text(key.name))
    }

    fn text(&self, name: &'static str) -> &str {
        let found = self.values.iter().find(|(k, ..)| k.name == name);
        &found.unwrap_or_else(|| panic!("{name} is not in KEYS")).1
    }

    /// `network.bind`
    pub fn bind(&self) -> Vec<SocketAddr> {
        parse_addresses(self.text("network.bind")).expect("checked when loaded")
    }

    /// `network.relay`
    pub fn relay(&self) -> Option<String> {
        Some(self.text("network.relay").trim().to_owned()).filter(|r| !r.is_empty())
    }

    /// `index.hash`
    pub fn hashes(&self) -> bool {
        self.text("index.hash") == "true"
    }

    /// `network.discovery`
    pub fn discovery(&self) -> bool {
        self.text("network.discovery") == "true"
    }

    /// `cache.limit` in bytes; `None` is automatic.
    pub fn cache_limit(&self) -> Option<u64> {
        parse_limit(self.text("cache.limit")).expect("checked when loaded")
    }

    /// `cache.min_free` in bytes; `None` is automatic.
    pub fn cache_min_free(&self) -> Option<u64> {
        parse_limit(self.text("cache.min_free")).expect("checked when loaded")
    }

    /// `staging.min_free` in bytes; `None` is automatic.
    pub fn staging_min_free(&self) -> Option<u64> {
        parse_limit(self.text("staging.min_free")).expect("checked when loaded")
    }

    /// `read.deadline`
    pub fn read_deadline(&self) -> Duration {
        parse_duration(self.text("read.deadline")).expect("checked when loaded")
    }

    /// `hydrate.*`
    pub fn hydration(&self) -> HydrationConfig {
        let mode = |name| parse_mode(self.text(name)).expect("checked when loaded");
        HydrationConfig {
            thumbnails: mode("hydrate.thumbnails"),
            indexing: mode("hydrate.indexing"),
            backup: mode("hydrate.backup"),
            programs: parse_programs(self.text("hydrate.programs")).expect("checked when loaded"),
        }
    }

    /// `index.rescan_after`
    pub fn rescan_after(&self) -> Duration {
        parse_duration(self.text("index.rescan_after")).expect("checked when loaded")
    }

    /// A whole number; `None` lets the program choose.
    pub fn count(&self, name: &'static str) -> Option<usize> {
        let count = self.text(name).trim().parse().expect("checked when loaded");
        Some(count).filter(|n| *n > 0)
    }

    /// `mount.passthrough`
    pub fn passthrough(&self) -> bool {
        self.text("mount.passthrough") == "auto"
    }

    /// `mount.events`
    pub fn tells_events(&self) -> bool {
        self.text("mount.events") == "auto"
    }

    /// `mount.foreign_symlinks`
    pub fn shows_foreign_symlinks(&self) -> bool {
        self.text("mount.foreign_symlinks") == "as_is"
    }

    /// `log.level`
    pub fn log_filter(&self) -> &str {
        self.text("log.level")
    }
}

/// The key of this name.
pub fn key(name: &str) -> Outcome<&'static Key> {
    KEYS.iter().find(|k| k.name == name).ok_or_else(|| unknown_key(name))
}

fn unknown_key(name: &str) -> Failure {
    let failure = Failure::new(Code::Usage, format!("“{name}” is not a configuration key"));
    match nearest(name, KEYS.iter().map(|k| k.name)) {
        Some(near) => {
            failure.hint(format!("did you mean {near}? `sd config list` shows every key"))
        }
        None => failure.hint("`sd config list` shows every key"),
    }
}

/// The environment variable of a key.
pub fn variable_of(name: &str) -> String {
    format!("SD_{}", name.replace('.', "_").to_uppercase())
}

/// Writes one value into the file, keeping everything else of it; `None` removes it.
pub fn write(file: &Path, name: &str, value: Option<&str>) -> Outcome<()> {
    let key = key(name)?;
    if let Some(text) = value {
        key.check(text).map_err(|e| e.at(name, Code::Usage))?;
    }
    let mut document = read_document(file)?;
    let (section, leaf) = key.name.split_once('.').expect("every key has a section");
    let table = document.entry(section).or_insert(Item::Table(Table::new()));
    let Some(table) = table.as_table_like_mut() else {
        return Err(not_a_section(file, section));
    };
    match value {
        Some(text) => {
            table.insert(leaf, Item::Value(key.to_toml(text)));
        }
        None => {
            table.remove(leaf);
        }
    }
    write_atomically(file, &document.to_string())
        .map_err(|e| Failure::io(format!("cannot write {}", file.display()), e))
}

fn write_atomically(file: &Path, text: &str) -> io::Result<()> {
    let temporary = file.with_extension("toml.new");
    fs::write(&temporary, text)?;
    fs::File::open(&temporary)?.sync_all()?;
    fs::rename(&temporary, file)
}

fn read_document(file: &Path) -> Outcome<DocumentMut> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(DocumentMut::new()),
        Err(e) => return Err(Failure::io(format!("cannot read {}", file.display()), e)),
    };
    text.parse().map_err(|e: toml_edit::TomlError| {
        Failure::new(Code::Invalid, format!("{} is not TOML: {}", file.display(), e.message()))
            .hint("correct that line, or remove the file to go back to the defaults")
    })
}

fn not_a_section(file: &Path, section: &str) -> Failure {
    Failure::new(Code::Invalid, format!("{}: “{section}” is not a section", file.display()))
        .hint("keys stand in sections, as [cache] and below it limit = \"20GiB\"")
}

/// The keys that the file sets, checked.
fn entries_of(document: &DocumentMut, file: &Path) -> Outcome<Vec<(&'static Key, String)>> {
    let mut found = Vec::new();
    for (section, item) in document.iter() {
        let table = item.as_table_like().ok_or_else(|| {
            match KEYS.iter().any(|k| k.name.starts_with(&format!("{section}."))) {
                true => not_a_section(file, section),
                false => in_file(file, unknown_key(section)),
            }
        })?;
        for (leaf, item) in table.iter() {
            let name = format!("{section}.{leaf}");
            let key = key(&name).map_err(|e| in_file(file, e))?;
            let text = item.as_value().and_then(text_of).ok_or_else(|| {
                Failure::new(Code::Invalid, format!("{}: {name} is not a value", file.display()))
                    .hint(key.form.expected())
            })?;
            key.check(&text)
                .map_err(|e| e.at(&format!("{}: {name}", file.display()), Code::Invalid))?;
            found.push((key, text));
        }
    }
    Ok(found)
}

fn in_file(file: &Path, failure: Failure) -> Failure {
    Failure {
        code: Code::Invalid,
        message: format!("{}: {}", file.display(), failure.message),
        ..failure
    }
}

fn text_of(value: &Value) -> Option<String> {
    Some(match value {
        Value::String(s) => s.value().clone(),
        Value::Integer(i) => i.value().to_string(),
        Value::Boolean(b) => b.value().to_string(),
        Value::Array(a) => {
            a.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()?.join(",")
        }
        _ => return None,
    })
}

/// Why a value was not taken.
struct BadValue {
    value: String,
    reason: String,
    hint: &'static str,
}

impl BadValue {
    fn at(self, place: &str, code: Code) -> Failure {
        Failure::new(code, format!("{place}: “{}” {}", self.value, self.reason)).hint(self.hint)
    }
}

impl Key {
    fn check(&self, text: &str) -> Result<(), BadValue> {
        self.form.check(text).map_err(|reason| BadValue {
            value: text.to_owned(),
            reason,
            hint: self.form.expected(),
        })
    }

    fn to_toml(&self, text: &str) -> Value {
        match self.form {
            Form::Addresses => Value::from(text.split(',').map(str::trim).collect::<Array>()),
            Form::Bool => Value::from(text == "true"),
            Form::Count { .. } => match text.trim().parse::<i64>() {
                Ok(count) => Value::from(count),
                Err(_) => Value::from(text),
            },
            _ => Value::from(text),
        }
    }
}

impl Form {
    fn check(self, text: &str) -> Result<(), String> {
        match self {
            Self::Addresses => parse_addresses(text).map(drop),
            Self::Text => Ok(()),
            Self::Bool => match text {
                "true" | "false" => Ok(()),
                _ => Err("is neither true nor false".into()),
            },
            Self::Size => parse_limit(text).map(drop),
            Self::Duration => parse_duration(text).map(drop),
            Self::Count { max } => match text.trim().parse::<u64>() {
                Ok(n) if n <= max => Ok(()),
                Ok(_) => Err(format!("is more than {max}")),
                Err(_) => Err("is not a whole number".into()),
            },
            Self::Word(words) => match words.contains(&text) {
                true => Ok(()),
                false => Err(format!("is not one of: {}", words.join(", "))),
            },
            Self::Programs => parse_programs(text).map(drop),
            Self::LogFilter => text
                .parse::<tracing_subscriber::EnvFilter>()
                .map(drop)
                .map_err(|e| format!("is not a log filter ({e})")),
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Addresses => "give address:port pairs, such as 0.0.0.0:4711,[::]:4711",
            Self::Text => "give a text",
            Self::Bool => "give true or false",
            Self::Size => "give bytes, such as 500MB or 20GiB, or auto",
            Self::Duration => "give a duration, such as 500ms, 10s or 5m",
            Self::Count { .. } => "give a whole number; 0 lets the program choose",
            Self::Word(_) => "`sd config list` shows what it takes",
            Self::Programs => {
                "give name=purpose pairs, such as photo-wall=thumbnails, tumblerd=none"
            }
            Self::LogFilter => "give error, warn, info, debug or trace",
        }
    }
}

fn parse_addresses(text: &str) -> Result<Vec<SocketAddr>, String> {
    text.split(',')
        .map(|a| a.trim().parse().map_err(|_| format!("has “{a}”, which is not address:port")))
        .collect()
}

fn parse_mode(text: &str) -> Option<Mode> {
    Some(match text {
        "whole" => Mode::Whole,
        "exact" => Mode::Exact,
        "small" => Mode::Small,
        "refuse" => Mode::Refuse,
        _ => return None,
    })
}

fn parse_programs(text: &str) -> Result<Vec<(String, Option<Purpose>)>, String> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    pairs.map(parse_program).collect()
}

fn parse_program(pair: &str) -> Result<(String, Option<Purpose>), String> {
    let (name, purpose) =
        pair.rsplit_once('=').ok_or_else(|| format!("has “{pair}”, which is not name=purpose"))?;
    let name = name.trim();
    if name.is_empty() || name.contains(['/', '=']) {
        return Err(format!("has “{name}”, which is not the name of a program's file"));
    }
    let purpose = match purpose.trim() {
        "none" => None,
        "thumbnails" => Some(Purpose::Thumbnails),
        "indexing" => Some(Purpose::Indexing),
        "backup" => Some(Purpose::Backup),
        other => {
            return Err(format!(
                "has “{other}”, which is not thumbnails, indexing, backup or none"
            ));
        }
    };
    Ok((name.to_owned(), purpose))
}

fn parse_limit(text: &str) -> Result<Option<u64>, String> {
    match text.trim() {
        "auto" => Ok(None),
        size => parse_size(size).map(Some),
    }
}

/// Bytes: a number with an optional unit (`k`, `MB`, `GiB`, …).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| "is not a size".to_owned())?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        unit => return Err(format!("has the unknown unit “{unit}”")),
    };
    let bytes = number * factor as f64;
    match bytes < (1u64 << 60) as f64 {
        true => Ok(bytes as u64),
        false => Err("is more than any disk has".into()),
    }
}

/// A number with a unit: `ms`, `s`, `m`, `h` or `d`; at most 30 days.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "is not a duration, such as 10s".to_owned())?;
    let unit_ms: u64 = match unit.trim() {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "" => return Err("has no unit, such as 10s".into()),
        unit => return Err(format!("has the unknown unit “{unit}”")),
    };
    match number.checked_mul(unit_ms) {
        Some(ms) if ms <= 30 * 86_400_000 => Ok(Duration::from_millis(ms)),
        _ => Err("is longer than 30 days".into()),
    }
}

/// `docs/CONFIG.md`.
#[cfg(test)]
fn document() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         One file, `config.toml` in the data directory, edited by `sd config set KEY VALUE` or by hand. \
         A key is overridden by its environment variable, that by `--set KEY=VALUE`. \
         `sd config list` shows every key, its value and where it comes from. \
         The daemon reads its configuration when it starts; `sd cache limit` acts at once.\n\n\
         | key | default | variable | meaning |\n|---|---|---|---|\n",
    );
    for key in KEYS {
        let default =
            if key.default.is_empty() { "*(empty)*" } else { &format!("`{}`", key.default) };
        text += &format!(
            "| `{}` | {default} | `{}` | {} |\n",
            key.name,
            variable_of(key.name),
            key.about
        );
    }
    text += &document_hydration();
    text += "\nThe data directory itself is `--data-dir DIR` or `SD_DATA_DIR`; \
             without them it is `$XDG_DATA_HOME/spacedrive` (`~/.local/share/spacedrive`).\n";
    text
}

/// The programs of `hydrate.*`.
#[cfg(test)]
fn document_hydration() -> String {
    let mut text = String::from(
        "\n## Programs that read for nobody who waits\n\n\
         `hydrate.thumbnails`, `hydrate.indexing` and `hydrate.backup` say what these programs get of other \
         devices' files that are not wholly here; [SEMANTICS](SEMANTICS.md) says what that means for them. \
         A program is known by the name of its file, by that of its process, and by the same names of those \
         that started it. `hydrate.programs` adds names and takes them out. \
         `whole` for all three turns the guard off. `sd status` and the log tell whom it kept from something.\n\n\
         | for | programs |\n|---|---|\n",
    );
    for (purpose, names) in vfs_core::hydration::KNOWN {
        let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
        let more = match purpose {
            Purpose::Thumbnails => "`*-thumbnailer`, ",
            _ => "",
        };
        text += &format!("| {purpose} | {more}{} |\n", names.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(toml: &str, env: &[(&str, &str)], flags: &[&str]) -> Outcome<Config> {
        let flags: Vec<_> = flags.iter().map(|f| f.to_string()).collect();
        let env = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Config::resolve(&toml.parse().unwrap(), Path::new("config.toml"), env, &flags)
    }

    #[test]
    fn every_default_is_a_value_of_its_key() {
        for key in KEYS {
            assert!(key.check(key.default).is_ok(), "{}", key.name);
        }
    }

    #[test]
    fn flags_win_over_the_environment_and_that_over_the_file() {
        let file = "[cache]\nlimit = \"1GiB\"\n[mount]\nthreads = 3\n";
        let env = [("SD_CACHE_LIMIT", "2GiB")];
        assert_eq!(resolve(file, &[], &[]).unwrap().cache_limit(), Some(1 << 30));
        assert_eq!(resolve(file, &[], &[]).unwrap().count("mount.threads"), Some(3));
        assert_eq!(resolve(file, &env, &[]).unwrap().cache_limit(), Some(2 << 30));
        let flag = resolve(file, &env, &["cache.limit=3GiB"]).unwrap();
        assert_eq!(flag.cache_limit(), Some(3 << 30));
    }

    #[test]
    fn an_unknown_key_names_the_nearest_one_wherever_it_stands() {
        for failure in [
            resolve("[cache]\nlimt = 1\n", &[], &[]).unwrap_err(),
            resolve("", &[], &["cache.limt=1"]).unwrap_err(),
        ] {
            assert!(failure.hint.unwrap().contains("cache.limit"), "{}", failure.message);
        }
    }

    #[test]
    fn sizes_and_durations() {
        assert_eq!(parse_size("20 GiB"), Ok(20 << 30));
        assert_eq!(parse_size("1.5k"), Ok(1536));
        assert_eq!(parse_size("500MB"), Ok(500_000_000));
        assert!(parse_size("lots").is_err() && parse_size("1 parsec").is_err());
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        assert!(parse_duration("10").is_err() && parse_duration("99999999999999999d").is_err());
    }

    #[test]
    fn programs_and_modes_of_hydration() {
        let default = resolve("", &[], &[]).unwrap().hydration();
        let modes = (default.thumbnails, default.indexing, default.backup);
        assert_eq!(modes, (Mode::Small, Mode::Refuse, Mode::Exact));
        let file = "[hydrate]\nthumbnails = \"whole\"\nprograms = \"a b=backup, tumblerd=none\"\n";
        let config = resolve(file, &[], &["hydrate.backup=refuse"]).unwrap().hydration();
        assert_eq!((config.thumbnails, config.backup), (Mode::Whole, Mode::Refuse));
        assert_eq!(
            config.programs,
            [("a b".to_owned(), Some(Purpose::Backup)), ("tumblerd".to_owned(), None)]
        );
        for bad in ["tumblerd", "=none", "/usr/bin/x=none", "x=reading", "x=none y=none"] {
            let flag = format!("hydrate.programs={bad}");
            assert!(resolve("", &[], &[&flag]).is_err(), "{bad}");
        }
        assert!(MODES.iter().all(|mode| parse_mode(mode).is_some()));
    }

    #[test]
    fn a_written_value_is_read_again_and_comments_stay() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        fs::write(&file, "# mine\n[cache]\nlimit = \"1GiB\" # small\n").unwrap();
        write(&file, "network.bind", Some("127.0.0.1:1, [::1]:2")).unwrap();
        write(&file, "cache.limit", Some("2GiB")).unwrap();
        let config = Config::resolve(&read_document(&file).unwrap(), &file, |_| None, &[]).unwrap();
        assert_eq!(config.cache_limit(), Some(2 << 30));
        assert_eq!(config.bind().len(), 2);
        assert!(fs::read_to_string(&file).unwrap().starts_with("# mine"));
        write(&file, "cache.limit", None).unwrap();
        let config = Config::resolve(&read_document(&file).unwrap(), &file, |_| None, &[]).unwrap();
        assert_eq!(config.cache_limit(), None);
    }

    #[test]
    fn the_document_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/CONFIG.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            fs::write(&path, document()).unwrap();
        }
        let written = fs::read_to_string(&path).unwrap_or_default();
        assert!(written == document(), "run UPDATE_DOCS=1 cargo test -p cli the_document");
    }
}

//! Programs that read for nobody who waits do not pull in a library.

use e2e::wait::wait_until;
use e2e::{Device, Lab, Need, files, proc};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const KIB: u64 = 1 << 10;
const PATIENCE: Duration = Duration::from_secs(60);
const PHOTO_BYTES: usize = 3 << 20;
const ICON_BYTES: usize = 20 << 10;

#[test]
fn a_thumbnailer_gets_icons_an_indexer_nothing_a_backup_what_it_reads_and_cat_everything() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    for n in 0..6 {
        fs::write(source.join(format!("photo-{n}")), files::random_bytes(PHOTO_BYTES, n)).unwrap();
        let icon = files::random_bytes(ICON_BYTES, 100 + n);
        fs::write(source.join(format!("icon-{n}")), icon).unwrap();
    }
    let (owner, mut reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let at = |device: &Device, name: &str| device.at("owner/files").join(name);
    let programs = lab.folder("programs");
    let [tumbler, updatedb] = ["tumblerd", "updatedb"].map(|name| copy("cat", &programs, name));
    let restic = copy("dd", &programs, "restic");

    for (program, name) in [(&tumbler, "photo-0"), (&updatedb, "photo-0"), (&updatedb, "icon-0")] {
        let refused = proc::run(Command::new(program).arg(at(&reader, name)), PATIENCE);
        assert!(refused.stderr.contains("Permission denied"), "{refused:?}");
        assert!(refused.stdout.is_empty());
    }
    assert_eq!(reader.content_bytes_in(), 0);
    reads(&tumbler, &at(&reader, "icon-0"), &source.join("icon-0"));
    assert_eq!(reader.content_bytes_in(), ICON_BYTES as u64);

    // Past the kernel's pages, which it fetches ahead by itself.
    let blocks = |name: &str, block: u64, count: u64| {
        let mut dd = Command::new(&restic);
        dd.arg(format!("if={}", at(&reader, name).display())).arg(format!("bs={block}"));
        dd.args([&format!("count={count}"), "iflag=direct", "of=/dev/null"]);
        proc::run(&mut dd, PATIENCE).ok();
    };
    let before = reader.content_bytes_in();
    blocks("photo-1", 64 * KIB, 24);
    assert_eq!(reader.content_bytes_in() - before, 24 * 64 * KIB);
    blocks("photo-2", 4 * KIB, 1);
    assert_eq!(reader.content_bytes_in() - before, 25 * 64 * KIB);

    let cat = Path::new("cat");
    reads(cat, &at(&reader, "photo-0"), &source.join("photo-0"));
    wait_cached(&at(&reader, "photo-0"));
    reads(&tumbler, &at(&reader, "photo-0"), &source.join("photo-0"));
    // Its owner's programs meet no guard.
    owner.mount();
    reads(&tumbler, &at(&owner, "photo-3"), &source.join("photo-3"));

    assert_eq!(guarded(&reader, "tumblerd", "refused"), 1);
    assert_eq!(guarded(&reader, "tumblerd", "exact"), 1);
    assert_eq!(guarded(&reader, "updatedb", "refused"), 2);
    assert_eq!(guarded(&reader, "restic", "exact"), 2);
    assert_eq!(guarded(&owner, "tumblerd", "refused"), 0);
    let told = reader.sd(&["status"]).ok().text();
    assert!(told.contains("tumblerd") && told.contains("hydrate.thumbnails"), "{told}");

    reader.sd(&["config", "set", "hydrate.thumbnails", "whole"]).ok();
    reader.sd(&["config", "set", "hydrate.programs", "updatedb=none"]).ok();
    reader.stop();
    reader.start();
    reader.wait_online("owner");
    reader.mount();
    reads(&tumbler, &at(&reader, "photo-3"), &source.join("photo-3"));
    reads(&updatedb, &at(&reader, "photo-4"), &source.join("photo-4"));
}

#[test]
fn a_real_file_manager_opens_a_folder_of_500_photos_and_moves_less_than_2_percent() {
    const PHOTOS: u64 = 500;
    const SMALL: u64 = 12;
    let Some(lab) = Lab::lan(&[Need::Fuse, Need::FileManager]) else { return };
    let source = lab.folder("source");
    for n in 0..PHOTOS {
        // Sorted behind the small ones.
        photo(&source.join(format!("photo-{n:03}.jpg")), 66, n);
    }
    for n in 0..SMALL {
        photo(&source.join(format!("icon-{n:02}.jpg")), 1, PHOTOS + n);
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let all = reader.location_row("owner", "files").expect("the location")["bytes"].clone();
    let all = all.as_u64().expect("a number");
    assert!(all >= 2 << 30, "only {all} bytes");

    let desktop = lab.folder("desktop");
    let shown = FileManager::open(&desktop, &reader.at("owner/files"));
    let made = || thumbnails(&desktop);
    wait_until("thumbnails of the small ones", PATIENCE, || made() >= SMALL as usize);
    wait_until("the thumbnailer to try photos", PATIENCE, || {
        guarded(&reader, "tumblerd", "refused") >= PHOTOS
    });
    wait_settled(|| (reader.content_bytes_in(), guarded(&reader, "tumblerd", "refused"), made()));
    drop(shown);
    let moved = reader.content_bytes_in();
    eprintln!("{moved} bytes of {all} moved, {:.3} %", moved as f64 * 100.0 / all as f64);
    eprintln!("{} thumbnails, {}", made(), reader.status()["hydration"]);
    assert!(moved > 0, "the small ones were read");
    assert!(moved < all / 50, "{moved} bytes of {all} moved");

    // What the guard kept away is what the file manager asked for: a photo that is here has one.
    let photo = reader.at("owner/files/photo-000.jpg");
    proc::run(Command::new("cat").arg(&photo), PATIENCE).ok();
    wait_cached(&photo);
    let before = made();
    let _shown = FileManager::open(&desktop, &reader.at("owner/files"));
    wait_until("a thumbnail of a photo that is here", PATIENCE, || made() > before);
}

fn copy(program: &str, folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    fs::copy(Path::new("/bin").join(program), &path).unwrap();
    path
}

#[track_caller]
fn reads(program: &Path, path: &Path, same: &Path) {
    let read = proc::run(Command::new(program).arg(path), PATIENCE).ok();
    assert!(read.stdout == fs::read(same).unwrap(), "{path:?}: other bytes");
}

/// What was read is in the cache a moment later.
#[track_caller]
fn wait_cached(path: &Path) {
    wait_until("the whole file in the cache", PATIENCE, || {
        let mut state = [0; 16];
        let read = rustix::fs::getxattr(path, "user.spacedrive.state", &mut state);
        read.is_ok_and(|n| &state[..n] == b"cached")
    });
}

fn guarded(device: &Device, program: &str, field: &str) -> u64 {
    let status = device.status();
    let rows = status["hydration"].as_array().expect("a list");
    let row = rows.iter().find(|row| row["program"] == program);
    row.and_then(|row| row[field].as_u64()).unwrap_or(0)
}

/// Waits until nothing has changed for a while.
#[track_caller]
fn wait_settled<T: PartialEq>(look: impl Fn() -> T) {
    let mut last = (look(), Instant::now());
    wait_until("the file manager to settle", PATIENCE, || {
        let now = look();
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > Duration::from_secs(3)
    });
}

/// A valid JPEG, gray, of 1600 × 1200, with segments of 64 KiB of comment before the image, which
/// a decoder reads.
fn photo(path: &Path, comments: usize, seed: u64) {
    const COMMENT: usize = 65_533;
    const SIZE: [u16; 2] = [1200, 1600];
    let mut jpeg = vec![0xff, 0xd8];
    let mut segment = |marker: u8, bytes: &[u8]| {
        jpeg.extend([0xff, marker]);
        jpeg.extend((bytes.len() as u16 + 2).to_be_bytes());
        jpeg.extend(bytes);
    };
    segment(0xe0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0");
    let noise = files::random_bytes(comments * COMMENT, seed);
    let last = if comments == 1 { ICON_BYTES } else { COMMENT };
    noise.chunks(COMMENT).for_each(|chunk| segment(0xfe, &chunk[..last]));
    segment(0xdb, &[&[0][..], &[1; 64]].concat());
    let [height, width] = SIZE.map(u16::to_be_bytes);
    segment(0xc0, &[&[8], &height[..], &width[..], &[1, 1, 0x11, 0]].concat());
    // One code each, of one bit: no difference to the block before, and no more in this block.
    let one_code = |table: u8| [&[table, 1][..], &[0; 15], &[0]].concat();
    segment(0xc4, &one_code(0x00));
    segment(0xc4, &one_code(0x10));
    segment(0xda, &[1, 1, 0, 0, 63, 0]);
    let blocks = usize::from(SIZE[0] / 8) * usize::from(SIZE[1] / 8);
    jpeg.extend(vec![0; blocks * 2 / 8]);
    jpeg.extend([0xff, 0xd9]);
    fs::File::create(path).unwrap().write_all(&jpeg).unwrap();
}

fn thumbnails(home: &Path) -> usize {
    let sizes = ["normal", "large", "x-large", "xx-large"];
    let folders = sizes.iter().map(|size| home.join(".cache/thumbnails").join(size));
    folders.filter_map(|folder| fs::read_dir(folder).ok()).map(Iterator::count).sum()
}

/// A file manager with one folder, on a screen that nobody sees, with a session bus of its own.
struct FileManager {
    log: PathBuf,
    screen: Child,
    session: Child,
}

impl FileManager {
    /// Its settings, and the thumbnails, are below `home`.
    fn open(home: &Path, folder: &Path) -> Self {
        let settings = home.join(".config/xfce4/xfconf/xfce-perchannel-xml");
        fs::create_dir_all(&settings).unwrap();
        fs::write(settings.join("thunar.xml"), SETTINGS).unwrap();
        let mut xvfb = Command::new("Xvfb");
        // The file manager has thumbnails made of what is in view: all of it.
        xvfb.args(["-displayfd", "1", "-screen", "0", "4000x4000x24", "-nolisten", "tcp"]);
        let mut screen = proc::spawn(xvfb.stdin(Stdio::null()).stdout(Stdio::piped()));
        let mut number = String::new();
        let stdout = screen.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut number).expect("the number of the display");

        let mut thunar = Command::new("dbus-run-session");
        thunar.args(["--", "thunar"]).arg(folder).env_clear().env("HOME", home);
        thunar.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        thunar.env("DISPLAY", format!(":{}", number.trim()));
        let log = home.join("thunar.log");
        let output = fs::File::create(&log).unwrap();
        thunar.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        Self { log, screen, session: proc::spawn(&mut thunar) }
    }
}

impl Drop for FileManager {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("---- the file manager\n{log}");
        }
        // Without its screen it ends, with it the session, with that the bus, and with that all
        // that the bus has started.
        let _ = self.screen.kill();
        let _ = self.screen.wait();
        let _ = self.session.wait();
    }
}

const SETTINGS: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<channel name="thunar" version="1.0">
  <property name="last-view" type="string" value="ThunarIconView"/>
  <property name="last-window-width" type="int" value="3900"/>
  <property name="last-window-height" type="int" value="3900"/>
</channel>
"#;

//! The first rows of the budgets, side by side in one run: the drive, the native file system, a
//! bare Iroh stream on the same link; and, when asked for, other programs that mount a remote
//! folder. Started by `scripts/bench`; needs root.
//!
//! Every figure is the median of [`ROUNDS`]; what is compared alternates, so that a slow minute
//! of the machine hits both.

mod compare;
mod crowd;
mod peers;
mod plot;
mod report;
mod scale;
mod supervise;
mod walks;

use anyhow::{Context, Result, ensure};
use e2e::disk::MemoryDisk;
use e2e::{Device, Lab, Need, files, peer, proc};
use iroh::endpoint::Connection;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
const MIB: u64 = 1 << 20;
const ALPN: &[u8] = b"bench/stream";
/// The addresses that the link's two ends have.
const OWNER_IP: &str = "10.77.0.1";
const LONG: Duration = Duration::from_secs(600);

const OPTIONS: [&str; 4] = ["--quick", "--json", "--strict", "--write"];
/// Where `--write` puts what was compared with other programs.
const DOCUMENT: &str = "docs/bench";

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", at] => serve(at.parse()?)?,
        ["pull", key, at, bytes] => pull(key.parse()?, at.parse()?, bytes.parse()?)?,
        [supervise::WORKER, ref args @ ..] => work(args)?,
        ref args => return supervise::run(&asked(args)?.all),
    }
    Ok(ExitCode::SUCCESS)
}

/// The command line.
struct Asked<'a> {
    all: Vec<&'a str>,
    options: Vec<&'a str>,
    parts: Vec<&'a str>,
    /// Of [`compare`].
    peers: Vec<&'a str>,
}

fn asked<'a>(args: &[&'a str]) -> Result<Asked<'a>> {
    let (options, words): (Vec<_>, Vec<_>) =
        args.iter().copied().partition(|arg| arg.starts_with("--"));
    let (peers, parts): (Vec<_>, Vec<_>) =
        words.into_iter().partition(|word| compare::is_group(word));
    let unknown = options.iter().find(|option| !OPTIONS.contains(option));
    ensure!(unknown.is_none(), "an option is one of {}", OPTIONS.join(", "));
    let is_part = |name: &&str| PARTS.iter().any(|(part, _)| part == name);
    let known = PARTS.map(|(part, _)| part).join(", ");
    ensure!(
        parts.iter().all(is_part),
        "a part is one of {known}, peers, {}",
        compare::parts().join(", ")
    );
    let writes = options.contains(&"--write");
    ensure!(!writes || !peers.is_empty(), "--write is for what is compared: name peers as well");
    Ok(Asked { all: args.to_vec(), options, parts, peers })
}

fn work(args: &[&str]) -> Result<()> {
    let asked = asked(args)?;
    let rows = match asked.parts.is_empty() && !asked.peers.is_empty() {
        true => vec![],
        false => measure(&asked.parts)?,
    };
    let writes = asked.options.contains(&"--write");
    let compared = compare::measure(&asked.peers, |rows| match writes {
        true => report::write(rows, Path::new(DOCUMENT)),
        false => Ok(()),
    })?;
    print(&rows, &compared, asked.options.contains(&"--json"));
    let missed = rows.iter().filter(|row| !row.met()).count();
    let is_strict = asked.options.contains(&"--strict");
    ensure!(!is_strict || missed == 0, "{missed} of the budgets are missed");
    Ok(())
}

type Part = (&'static str, fn() -> Result<Vec<Row>>);

const PARTS: [Part; 8] = [
    ("own", own_files),
    ("lan", lan),
    ("walk", walks::walks),
    ("far", far),
    ("crowd", crowd::crowd),
    ("many", many_entries),
    ("scale", scale::million),
    ("vast", scale::five_million),
];
/// Parts that take longer than all others run only when they are named.
const ONLY_NAMED: [&str; 2] = ["scale", "vast"];

/// One line of the table.
struct Row {
    work: String,
    /// What it is measured in, and whether more is better.
    unit: &'static str,
    /// What it is compared with, and its figure; `None` where the budget is absolute.
    reference: Option<(&'static str, f64)>,
    drive: f64,
    /// From the budgets, where they speak of it: a ratio where there is a reference, else a figure.
    must: Option<f64>,
}

impl Row {
    fn more_is_better(&self) -> bool {
        self.unit.ends_with("/s") || self.unit == "Mbit/s"
    }

    /// What the budget speaks of.
    fn measure(&self) -> f64 {
        self.reference.map_or(self.drive, |(_, reference)| self.drive / reference)
    }

    fn met(&self) -> bool {
        self.must.is_none_or(|must| match self.more_is_better() {
            true => self.measure() >= must,
            false => self.measure() <= must,
        })
    }

    fn json(&self) -> Value {
        let (name, figure) = self.reference.unzip();
        json!({
            "work": self.work, "unit": self.unit, "drive": self.drive, "reference": name,
            "reference_figure": figure, "must": self.must, "measure": self.measure(),
            "met": self.met(),
        })
    }

    fn print(&self) {
        let (name, figure) = match self.reference {
            Some((name, figure)) => (name, format!("{figure:.2}")),
            None => ("", String::new()),
        };
        let ratio = self.reference.map_or(String::new(), |_| format!("{:.2} ×", self.measure()));
        let sign = if self.more_is_better() { "≥" } else { "≤" };
        let met = if self.met() { "met" } else { "MISSED" };
        let must = self.must.map_or(String::new(), |must| format!("{sign} {must:<6} {met}"));
        println!(
            "{:<52} {:>7} {figure:>10} {name:<16} {:>10.2} {ratio:>8}  {must}",
            self.work, self.unit, self.drive
        );
    }
}

/// All parts, or those that are named.
fn measure(wanted: &[&str]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let is_wanted = |name| match wanted {
        [] => !ONLY_NAMED.contains(&name),
        wanted => wanted.contains(&name),
    };
    let parts = PARTS.iter().filter(|(name, _)| is_wanted(name));
    for (_, part) in parts {
        let began = Instant::now();
        rows.extend(part()?);
        eprintln!("{} rows, {:.0} s", rows.len(), began.elapsed().as_secs_f64());
    }
    Ok(rows)
}

fn print(rows: &[Row], compared: &[report::Comparison], as_json: bool) {
    if as_json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        println!("{}", json!({ "rounds": ROUNDS, "rows": rows, "peers": compared }));
        return;
    }
    if !rows.is_empty() {
        println!(
            "{:<52} {:>7} {:>10} {:<16} {:>10} {:>8}  {:<8}",
            "work", "unit", "reference", "", "drive", "ratio", "must be"
        );
        rows.iter().for_each(Row::print);
        println!("medians of {ROUNDS}, but {}", ONLY_NAMED.join(" and "));
    }
    if !compared.is_empty() {
        print!("{}", report::table(compared));
        report::reasons(compared).iter().for_each(|line| println!("{line}"));
        println!("medians of {ROUNDS}");
    }
}

/// The median of both, measured in turns.
fn side_by_side(
    mut reference: impl FnMut() -> Result<f64>,
    mut drive: impl FnMut() -> Result<f64>,
) -> Result<(f64, f64)> {
    let (mut theirs, mut ours) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        theirs.push(reference()?);
        ours.push(drive()?);
    }
    Ok((median(theirs), median(ours)))
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Reads a whole file; MiB/s.
fn read_speed(path: &Path) -> Result<f64> {
    let mut block = vec![0; MIB as usize];
    let began = Instant::now();
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let mut total = 0;
    loop {
        match file.read(&mut block)? {
            0 => break,
            n => total += n as u64,
        }
    }
    ensure!(total > 0, "{} is empty", path.display());
    Ok(total as f64 / MIB as f64 / began.elapsed().as_secs_f64())
}

fn cold_read_speed(path: &Path) -> Result<f64> {
    files::drop_kernel_caches();
    read_speed(path)
}

/// From `open` to the first byte; milliseconds.
fn first_byte(path: &Path) -> Result<f64> {
    let began = Instant::now();
    File::open(path)?.read_exact(&mut [0])?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// `find -ls` of a tree; seconds.
fn walk(folder: &Path) -> Result<f64> {
    let finished = proc::run(Command::new("find").arg(folder).arg("-ls"), LONG).ok();
    Ok(finished.took.as_secs_f64())
}

fn lab_or_reason(lab: Option<Lab>) -> Result<Lab> {
    lab.context("this machine cannot run the benchmark; the line above says why")
}

/// A lab whose link has these options of `netlab.c`; without any, it is as fast as it gets.
fn lab_on(link: &[&str]) -> Result<Lab> {
    let needs = [Need::Root, Need::Fuse];
    lab_or_reason(match link {
        [] => Lab::lan(&needs),
        options => Lab::emulated(&needs, options),
    })
}

/// A mount that the kernel remembers nothing of.
fn fresh_mount(reader: &Device) {
    let mountpoint = reader.mountpoint();
    reader.sd(&["unmount".as_ref(), mountpoint.as_os_str()]).ok();
    files::drop_kernel_caches();
    reader.mount();
}

/// As if nothing had ever been read.
fn forget_content(reader: &Device) {
    let mountpoint = reader.mountpoint();
    reader.sd(&["unmount".as_ref(), mountpoint.as_os_str()]).ok();
    reader.sd(&["cache", "clear", "--yes"]).ok();
    files::drop_kernel_caches();
    reader.mount();
}

fn own_files() -> Result<Vec<Row>> {
    let lab = lab_or_reason(Lab::local(&[Need::Root, Need::Fuse]))?;
    let folder = lab.folder("location");
    let file = folder.join("file");
    files::random_file(&file, 1024 * MIB, 1);
    let device = lab.device("solo");
    device.sd(&["library", "create", "home", "--device-name", "solo"]).ok();
    device.share(&folder, "files");
    device.mount();
    let mounted = device.at("solo/files/file");
    eprintln!("passthrough: {}", device.status()["mounts"][0]["passthrough"]);
    let cold = side_by_side(|| cold_read_speed(&file), || cold_read_speed(&mounted))?;
    let warm = side_by_side(|| read_speed(&file), || read_speed(&mounted))?;
    let row = |work: &str, (native, drive)| Row {
        work: work.into(),
        unit: "MiB/s",
        reference: Some(("native", native)),
        drive,
        must: Some(0.9),
    };
    Ok(vec![
        row("read 1 GiB of own files through the mount, cold", cold),
        row("read 1 GiB of own files through the mount, warm", warm),
    ])
}

fn lan() -> Result<Vec<Row>> {
    let lab = lab_or_reason(Lab::lan(&[Need::Root, Need::Fuse]))?;
    let source = lab.folder("source");
    let size = 512 * MIB;
    files::random_file(&source.join("big"), size, 2);
    for n in 0..16 {
        files::random_file(&source.join(format!("small-{n}")), 16 * MIB, n);
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let mounted = reader.at("owner/files");

    let mut stream = BareStream::start(&owner, &reader)?;
    let (bare, cold) = side_by_side(
        || stream.speed(size),
        || {
            forget_content(&reader);
            read_speed(&mounted.join("big"))
        },
    )?;
    let native_file = source.join("big");
    let again =
        side_by_side(|| cold_read_speed(&native_file), || cold_read_speed(&mounted.join("big")))?;
    let rtt_ms = stream.rtt_ms()?;
    // Before anything is written: both devices share the disk, and it would be busy with that.
    forget_content(&reader);
    let first = median_of(16, |n| first_byte(&mounted.join(format!("small-{n}"))))?;
    let (mut round, mut until_there) = (0, Vec::new());
    let native = lab.folder("native");
    let (native_write, write) = side_by_side(
        || {
            round += 1;
            synced_write(&native.join("new"), round)
        },
        || {
            let seconds = synced_write(&mounted.join("new"), 100 + until_there.len() as u64)?;
            until_there.push(seconds + until_delivered(&reader)?);
            Ok(seconds)
        },
    )?;
    Ok(vec![
        Row {
            work: "first read of a remote file of 512 MiB, LAN".into(),
            unit: "MiB/s",
            reference: Some(("bare Iroh stream", bare)),
            drive: cold,
            must: Some(0.75),
        },
        Row {
            work: "the same again, cached, page cache dropped".into(),
            unit: "MiB/s",
            reference: Some(("native, cold", again.0)),
            drive: again.1,
            must: Some(0.9),
        },
        Row {
            work: "write 256 MiB to a remote device, LAN, until close".into(),
            unit: "s",
            reference: Some(("native, synced", native_write)),
            drive: write,
            must: Some(1.3),
        },
        Row {
            work: "the same, until its owner has it".into(),
            unit: "s",
            reference: None,
            drive: median(until_there),
            must: Some(1.5),
        },
        Row {
            work: "first byte of an uncached remote file, LAN".into(),
            unit: "ms",
            reference: None,
            drive: first,
            must: Some(2.0 * rtt_ms + 5.0),
        },
    ])
}

fn median_of(rounds: usize, mut figure: impl FnMut(usize) -> Result<f64>) -> Result<f64> {
    Ok(median((0..rounds).map(&mut figure).collect::<Result<_>>()?))
}

fn far() -> Result<Vec<Row>> {
    let rate = 200.0;
    let options = ["--delay", "10", "--rate", "200"];
    let lab = lab_or_reason(Lab::emulated(&[Need::Root, Need::Fuse], &options))?;
    let source = lab.folder("source");
    // Devices that are far from each other have a disk each.
    let _owners = [MemoryDisk::mount(&source), MemoryDisk::mount(&lab.folder("owner"))];
    files::random_file(&source.join("big"), 100 * MIB, 3);
    for n in 0..16 {
        files::random_file(&source.join(format!("small-{n}")), 16 * MIB, n);
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let mounted = reader.at("owner/files");
    let first = median_of(16, |n| first_byte(&mounted.join(format!("small-{n}"))))?;
    let speed = median_of(ROUNDS, |_| {
        forget_content(&reader);
        Ok(read_speed(&mounted.join("big"))? * MIB as f64 * 8.0 / 1e6)
    })?;
    let (mut round, mut until_there) = (0, Vec::new());
    let native = lab.folder("native");
    let (synced, made) = side_by_side(
        || {
            round += 1;
            thousand_synced_files(&native.join(format!("{round}")))
        },
        || {
            let folder = mounted.join(format!("made-{}", until_there.len()));
            let seconds = thousand_files(&folder)?;
            until_there.push(seconds + until_delivered(&reader)?);
            Ok(seconds)
        },
    )?;
    Ok(vec![
        Row {
            work: "first read of a remote file, 20 ms, 200 Mbit/s".into(),
            unit: "Mbit/s",
            reference: Some(("line rate", rate)),
            drive: speed,
            must: Some(0.85),
        },
        Row {
            // A thousand in seconds is each in milliseconds.
            work: "create 1,000 files of 4 KiB, 20 ms, each".into(),
            unit: "ms",
            reference: None,
            drive: made,
            must: Some(0.5),
        },
        Row {
            work: "the same beside a disk that is asked to sync".into(),
            unit: "ms",
            reference: Some(("native, synced", synced)),
            drive: made,
            must: Some(1.0),
        },
        Row {
            work: "the same, until their owner has them, all".into(),
            unit: "s",
            reference: None,
            drive: median(until_there),
            must: Some(2.0),
        },
        Row {
            work: "first byte of an uncached remote file, 20 ms".into(),
            unit: "ms",
            reference: None,
            drive: first,
            must: Some(45.0),
        },
    ])
}

/// Each closed before the next one, which makes it durable.
fn thousand_files(folder: &Path) -> Result<f64> {
    let all: Vec<_> = (0..1000).map(|n| files::random_bytes(4096, n)).collect();
    fs::create_dir(folder)?;
    let began = Instant::now();
    for (n, bytes) in all.iter().enumerate() {
        fs::write(folder.join(n.to_string()), bytes)?;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// The same on a native disk, where a close alone makes nothing durable.
fn thousand_synced_files(folder: &Path) -> Result<f64> {
    let all: Vec<_> = (0..1000).map(|n| files::random_bytes(4096, n)).collect();
    fs::create_dir(folder)?;
    let began = Instant::now();
    for (n, bytes) in all.iter().enumerate() {
        let mut file = File::create(folder.join(n.to_string()))?;
        file.write_all(bytes)?;
        file.sync_all()?;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// In seconds, of 256 MiB that no file has yet: what is there already would not travel.
fn synced_write(path: &Path, seed: u64) -> Result<f64> {
    let bytes = files::random_bytes(256 << 20, seed);
    let began = Instant::now();
    let mut file = File::create(path)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    drop(file);
    Ok(began.elapsed().as_secs_f64())
}

/// In seconds.
fn until_delivered(reader: &Device) -> Result<f64> {
    let began = Instant::now();
    reader.sd(&["sync", "--timeout", "120s"]).ok();
    Ok(began.elapsed().as_secs_f64())
}

fn many_entries() -> Result<Vec<Row>> {
    let lab = lab_or_reason(Lab::lan(&[Need::Root, Need::Fuse]))?;
    let source = lab.folder("source");
    for directory in 0..200 {
        let directory = source.join(format!("{directory}"));
        fs::create_dir(&directory)?;
        for file in 0..1000 {
            File::create(directory.join(format!("file-{file}")))?;
        }
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let idle = [&owner, &reader].map(|device| mib(device.memory().1));
    walk(&reader.at("owner/files"))?;
    let peak = [&owner, &reader].map(|device| mib(device.memory().0));
    let row = |work: &str, drive, must| Row {
        work: work.into(),
        unit: "MiB",
        reference: None,
        drive,
        must: Some(must),
    };
    // The budget is for a million entries; a fifth of them has no excuse to need more.
    Ok(vec![
        row("memory of the owner, 200,000 entries, idle", idle[0], 150.0),
        row("memory of the reader, 200,000 entries, idle", idle[1], 150.0),
        row("peak memory of the owner, after the scan", peak[0], 300.0),
        row("peak memory of the reader, after find -ls", peak[1], 300.0),
    ])
}

/// A stream of Iroh alone between the two ends of a link: the server runs beside the owner, the
/// client beside the reader, each a process of its own as the daemons are.
struct BareStream<'a> {
    reader: &'a Device,
    server: std::process::Child,
    address: SocketAddr,
    key: String,
}

impl<'a> BareStream<'a> {
    fn start(owner: &Device, reader: &'a Device) -> Result<Self> {
        let address: SocketAddr = format!("{OWNER_IP}:7999").parse()?;
        let mut command = owner.command(std::env::current_exe()?);
        command.arg("serve").arg(address.to_string()).stdout(std::process::Stdio::piped());
        let mut stream =
            Self { reader, server: proc::spawn(&mut command), address, key: String::new() };
        let stdout = stream.server.stdout.take().context("a pipe")?;
        let mut lines = std::io::BufReader::new(stdout);
        std::io::BufRead::read_line(&mut lines, &mut stream.key)?;
        stream.key.truncate(stream.key.trim_end().len());
        Ok(stream)
    }

    /// MiB/s of one stream.
    fn speed(&mut self, bytes: u64) -> Result<f64> {
        Ok(bytes as f64 / MIB as f64 / self.seconds(bytes)?)
    }

    fn rtt_ms(&mut self) -> Result<f64> {
        Ok(median_of(ROUNDS, |_| self.seconds(1))? * 1e3)
    }

    fn seconds(&mut self, bytes: u64) -> Result<f64> {
        let mut command = self.reader.command(std::env::current_exe()?);
        command.args(["pull", &self.key, &self.address.to_string(), &bytes.to_string()]);
        Ok(proc::run(&mut command, LONG).ok().text().trim().parse()?)
    }
}

impl Drop for BareStream<'_> {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[tokio::main]
async fn serve(at: SocketAddr) -> Result<()> {
    let endpoint = peer::endpoint(peer::new_key(), at, &[ALPN]).await;
    println!("{}", endpoint.id());
    while let Some(incoming) = endpoint.accept().await {
        let Ok(connection) = incoming.await else { continue };
        tokio::spawn(async move { send_all(connection).await });
    }
    Ok(())
}

/// Answers each stream with as many bytes as it asks for.
async fn send_all(connection: Connection) -> Result<()> {
    let block = bytes::Bytes::from(vec![7; 256 << 10]);
    loop {
        let (mut send, mut receive) = connection.accept_bi().await?;
        let mut wanted = [0; 8];
        receive.read_exact(&mut wanted).await?;
        let mut left = u64::from_le_bytes(wanted);
        while left > 0 {
            let part = left.min(block.len() as u64);
            send.write_chunk(block.slice(..part as usize)).await?;
            left -= part;
        }
        send.finish()?;
    }
}

/// Prints the seconds that one stream took on a connection that was already there.
#[tokio::main]
async fn pull(key: iroh::PublicKey, at: SocketAddr, bytes: u64) -> Result<()> {
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let endpoint = peer::endpoint(peer::new_key(), any, &[]).await;
    let connection = peer::connect(&endpoint, key, at, ALPN).await.context("no connection")?;
    // Opens the congestion window, as the daemons' long-lived connection has.
    for _ in 0..3 {
        receive_all(&connection, bytes.min(8 * MIB)).await?;
    }
    let began = Instant::now();
    receive_all(&connection, bytes).await?;
    println!("{}", began.elapsed().as_secs_f64());
    endpoint.close().await;
    Ok(())
}

async fn receive_all(connection: &Connection, bytes: u64) -> Result<()> {
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&bytes.to_le_bytes()).await?;
    send.finish()?;
    let mut total = 0;
    while let Some(chunk) = receive.read_chunk(1 << 20).await? {
        total += chunk.len() as u64;
    }
    ensure!(total == bytes, "{total} of {bytes} bytes");
    Ok(())
}

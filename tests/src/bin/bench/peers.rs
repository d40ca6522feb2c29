//! The programs that people use today for what the drive does: a table of shell commands, and one
//! of them running between the two ends of a link.

use anyhow::{Context, Result, bail, ensure};
use e2e::{Device, device, proc};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use crate::OWNER_IP;

/// How long a server or a mount may take until it answers.
const SOON: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(10);
/// For what runs once: keys, a first walk through everything.
const PREPARING: Duration = Duration::from_secs(120);

/// One program. The commands are for `sh`, in a folder of their own, with these variables:
/// `STATE` is that folder, `EXPORT` what the owner shares, `IP` and `PORT` where it listens,
/// `MOUNT` where its files are to appear. `serve` and `mount` stay in the foreground.
pub struct Kind {
    pub name: &'static str,
    /// What a reader of the table must know of it.
    pub what: &'static str,
    programs: &'static [&'static str],
    version: &'static str,
    port: u16,
    /// It leaves marks in what it exports, which others would have to carry.
    pub own_copy: bool,
    prepare: &'static str,
    serve: &'static str,
    /// At the owner, once the server listens.
    settle: &'static str,
    mount: &'static str,
}

pub const KINDS: [Kind; 4] = [
    Kind {
        name: "sshfs",
        what: "with its defaults, over OpenSSH's `sshd`",
        programs: &["sshfs", "sshd", "ssh-keygen"],
        // The programs that it is made of say theirs besides.
        version: "sshfs --version 2>&1 | grep -i ^sshfs",
        port: 2222,
        own_copy: false,
        prepare: SSH_KEYS,
        serve: SSHD,
        settle: "",
        mount: r#"exec sshfs -f -F /dev/null -p "$PORT" -o IdentityFile="$STATE/user_key" \
            -o StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,LogLevel=ERROR \
            "root@$IP:$EXPORT" "$MOUNT""#,
    },
    Kind {
        name: "rclone, sftp",
        what: "`rclone mount --vfs-cache-mode full --vfs-fast-fingerprint`, over OpenSSH's `sshd`",
        programs: &["rclone", "sshd", "ssh-keygen"],
        version: "rclone version",
        port: 2223,
        own_copy: false,
        prepare: SSH_KEYS,
        serve: SSHD,
        settle: "",
        mount: r#"exec rclone mount ":sftp,host=$IP,port=$PORT,user=root,key_file='$STATE/user_key':$EXPORT" \
            "$MOUNT" --config "" --cache-dir "$STATE/cache" \
            --vfs-cache-mode full --vfs-fast-fingerprint"#,
    },
    Kind {
        name: "rclone, webdav",
        what: "`rclone mount --vfs-cache-mode full` of `rclone serve webdav`, not encrypted",
        programs: &["rclone"],
        version: "rclone version",
        port: 8088,
        own_copy: false,
        prepare: "",
        serve: r#"exec rclone serve webdav "$EXPORT" --addr "$IP:$PORT" --config """#,
        settle: "",
        mount: r#"exec rclone mount ":webdav,url='http://$IP:$PORT',vendor=other:" "$MOUNT" \
            --config "" --cache-dir "$STATE/cache" --vfs-cache-mode full"#,
    },
    Kind {
        name: "glusterfs",
        what: "one brick, the usual client translators, no cache on disk, not encrypted",
        programs: &["glusterfs", "glusterfsd"],
        version: "glusterfs --version",
        port: 24999,
        own_copy: true,
        prepare: GLUSTER_VOLUMES,
        serve: r#"exec glusterfsd -N -f brick.vol -l "$STATE/log" -p "$STATE/brick.pid""#,
        // It gives every file an id at first sight.
        settle: r#"mkdir -p crawl
            glusterfs -f client.vol -l "$STATE/log" -p "$STATE/crawl.pid" crawl
            find crawl >all && umount crawl"#,
        mount: r#"exec glusterfs -N -f client.vol -l "$STATE/log" -p "$STATE/client.pid" "$MOUNT""#,
    },
];

/// Keys of the run's own; the user's settings and known hosts are not read.
const SSH_KEYS: &str = r#"
    for key in host_key user_key; do ssh-keygen -q -t ed25519 -N '' -f "$key"; done
    mkdir -p -m 755 /run/sshd
    cat >sshd_config <<END
ListenAddress $IP:$PORT
HostKey $STATE/host_key
AuthorizedKeysFile $STATE/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
PidFile none
UseDNS no
MaxStartups 100
Subsystem sftp internal-sftp
END
"#;
/// It insists on being called by its whole path.
const SSHD: &str = r#"exec "$(command -v sshd)" -D -e -f sshd_config"#;

const GLUSTER_VOLUMES: &str = r#"
    cat >brick.vol <<END
volume posix
  type storage/posix
  option directory $EXPORT
end-volume
volume locks
  type features/locks
  subvolumes posix
end-volume
volume brick
  type performance/io-threads
  subvolumes locks
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.address-family inet
  option transport.socket.bind-address $IP
  option transport.socket.listen-port $PORT
  option auth.addr.brick.allow *
  subvolumes brick
end-volume
END
    cat >client.vol <<END
volume client
  type protocol/client
  option transport-type tcp
  option transport.address-family inet
  option remote-host $IP
  option remote-port $PORT
  option remote-subvolume brick
end-volume
END
    below=client
    for layer in write-behind read-ahead readdir-ahead io-cache quick-read open-behind md-cache; do
        printf 'volume %s\n  type performance/%s\n  subvolumes %s\nend-volume\n' \
            "$layer" "$layer" "$below" >>client.vol
        below=$layer
    done
"#;

/// `PATH` with the system's directories, which a user's often lacks.
fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

impl Kind {
    /// What it says of itself, in a line; why it cannot be had here, otherwise.
    pub fn version(&self) -> Result<String> {
        for program in self.programs {
            let path = search_path();
            let found = std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
            ensure!(found, "no {program} here; scripts/setup --bench installs it");
        }
        let mut version = Command::new("sh");
        version.args(["-c", self.version]).env("PATH", search_path());
        let said = proc::run(&mut version, SOON).text();
        Ok(said.lines().next().context("it does not say its version")?.to_owned())
    }
}

/// A program's server at the owner, and its mount at the reader while there is one. Both processes
/// end, and the mount is gone, when this is dropped.
pub struct Peer<'a> {
    kind: &'static Kind,
    owner: &'a Device,
    reader: &'a Device,
    export: PathBuf,
    state: PathBuf,
    server: Option<Child>,
    client: Option<Child>,
}

impl<'a> Peer<'a> {
    /// Starts the server of `export`, and mounts it once, to see that it works; `state` is an empty
    /// folder.
    pub fn start(
        kind: &'static Kind,
        [owner, reader]: [&'a Device; 2],
        export: &Path,
        state: &Path,
    ) -> Result<Self> {
        kind.version()?;
        let (export, state) = (export.to_owned(), state.to_owned());
        let mut peer = Self { kind, owner, reader, export, state, server: None, client: None };
        fs::create_dir_all(peer.mountpoint())?;
        peer.run(kind.prepare)?;
        peer.server = Some(peer.spawn(owner, kind.serve)?);
        peer.wait_listening()?;
        peer.run(kind.settle)?;
        peer.mount()?;
        peer.unmount();
        Ok(peer)
    }

    /// Mounts what the owner exports, with nothing of it cached.
    pub fn mount(&mut self) -> Result<PathBuf> {
        let mountpoint = self.mountpoint();
        self.client = Some(self.spawn(self.reader, self.kind.mount)?);
        let names = |folder: &Path| fs::read_dir(folder).map_or(0, Iterator::count);
        let is_there = || device::is_mounted(&mountpoint) && names(&mountpoint) > 0;
        self.wait("its mount", &self.client, is_there)?;
        Ok(mountpoint)
    }

    /// What the owner shares by it.
    pub fn export(&self) -> &Path {
        &self.export
    }

    /// Ends the mount and forgets what it cached, also what it has not delivered yet.
    pub fn unmount(&mut self) {
        device::detach_mounts_below(&self.mountpoint());
        self.client.take().into_iter().for_each(end);
        let _ = fs::remove_dir_all(self.state.join("cache"));
    }

    fn mountpoint(&self) -> PathBuf {
        self.state.join("mount")
    }

    fn script(&self, device: &Device, script: &str) -> Command {
        let mut command = device.command("sh");
        command
            .args(["-euc", script])
            .current_dir(&self.state)
            .env("PATH", search_path())
            .env("STATE", &self.state)
            .env("EXPORT", &self.export)
            .env("MOUNT", self.mountpoint())
            .env("IP", OWNER_IP)
            .env("PORT", self.kind.port.to_string());
        command
    }

    fn run(&self, script: &str) -> Result<()> {
        let finished = proc::run(&mut self.script(self.owner, script), PREPARING);
        ensure!(finished.status.success(), "{}", finished.stderr.trim());
        Ok(())
    }

    fn spawn(&self, device: &Device, script: &str) -> Result<Child> {
        let log = File::options().create(true).append(true).open(self.log())?;
        let mut command = self.script(device, script);
        Ok(proc::spawn(command.stdout(log.try_clone()?).stderr(log)))
    }

    fn log(&self) -> PathBuf {
        self.state.join("log")
    }

    fn wait_listening(&self) -> Result<()> {
        let Some(server) = &self.server else { return Ok(()) };
        // Of the namespace that the process is in; 0A is the state of one that listens.
        let (table, port) = (format!("/proc/{}/net/tcp", server.id()), self.kind.port);
        let listens = |line: &str| line.contains(&format!(":{port:04X} 00000000:0000 0A"));
        let is_there = || fs::read_to_string(&table).is_ok_and(|text| text.lines().any(listens));
        self.wait("its server", &self.server, is_there)
    }

    /// Fails with the last line of the log.
    fn wait(&self, what: &str, child: &Option<Child>, is_there: impl Fn() -> bool) -> Result<()> {
        let began = Instant::now();
        let process = child.as_ref().map(|child| format!("/proc/{}/stat", child.id()));
        let ended = || {
            let stat = process.as_ref().and_then(|stat| fs::read_to_string(stat).ok());
            stat.is_none_or(|stat| stat.contains(") Z "))
        };
        while !is_there() {
            if ended() || began.elapsed() > SOON {
                let log = fs::read_to_string(self.log()).unwrap_or_default();
                let last = log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
                bail!("{what} did not come up: {last}");
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        self.unmount();
        self.server.take().into_iter().for_each(end);
        // What `settle` may have left.
        device::detach_mounts_below(&self.state);
    }
}

fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

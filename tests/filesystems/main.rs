//! Real file systems: stores on small disks of ext4, xfs, btrfs and tmpfs that fill up, fail, go read-only, are slow to
//! sync, and lose their power.
//!
//! The disks are served by this process ([`device`]), so it knows which writes a flush has covered, and what a power cut
//! may leave. All work on a store is done by child processes ([`child`]), so that a death by signal is seen. Everything
//! runs in mount and process namespaces of its own: when it ends, however that comes, nothing stays mounted.
//!
//! ```text
//! cargo test --test filesystems -- --help
//! ```

mod calls;
mod child;
mod cuts;
mod device;
mod ground;
mod life;
mod scenes;

use clap::Parser;
use fastrand::Rng;
use ground::{Ground, Kind};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Set in the process that has its own namespaces.
const INSIDE: &str = "ONCEKEY_FILESYSTEMS_INSIDE";

#[derive(Parser, Clone)]
#[command(about = "Stores on real file systems that fill up, fail, go read-only and lose their power")]
struct Args {
    /// Images after power cuts, on each file system that has a disk.
    #[arg(long, default_value_t = 50)]
    images: u64,
    /// File systems; all if not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Kind>,
    /// Checks; all if not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    checks: Vec<Check>,
    /// Each call of each kind fails once, instead of a few of them.
    #[arg(long)]
    every_call: bool,
    /// Tell how long each check took.
    #[arg(long)]
    times: bool,
    /// Seed of all that is random; threads and the kernel are not held to it.
    #[arg(long)]
    seed: Option<u64>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Check {
    /// Whether the disk loses what was not flushed, and nothing else.
    Disk,
    Fill,
    Inodes,
    Ulimit,
    Readonly,
    Eio,
    Slow,
    Calls,
    Cuts,
}

#[derive(clap::Subcommand, Clone)]
enum Role {
    /// Lives through keys until it is killed.
    #[command(hide = true)]
    Work { dir: PathBuf },
    /// Compares a store with a ledger.
    #[command(hide = true)]
    Check { dir: PathBuf, ledger: PathBuf },
    /// Plays a scene.
    #[command(hide = true)]
    Play { scene: String, kind: Kind, at: PathBuf, file: Option<PathBuf> },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let ended = match &args.role {
        Some(Role::Work { dir }) => cuts::work(dir).map(|()| true),
        Some(Role::Check { dir, ledger }) => cuts::check(dir, ledger).map(|()| true),
        Some(Role::Play { scene, kind, at, file }) => {
            scenes::play(scene, &Ground { kind: *kind, file: file.clone(), at: at.clone() }).map(|()| true)
        }
        None if std::env::var_os(INSIDE).is_none() => go_inside(),
        None => Run::new(&args).and_then(Run::all),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("filesystems: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs this once more, in namespaces that go with it. It is killed when this process ends, by whatever.
fn go_inside() -> Result<bool> {
    let missing = missing();
    if !missing.is_empty() {
        return Err(format!("can't run here; missing: {}", missing.join(", ")).into());
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private"]);
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(std::env::current_exe()?).args(std::env::args_os().skip(1)).env(INSIDE, "1");
    Ok(command.status()?.success())
}

/// What the machine lacks.
fn missing() -> Vec<&'static str> {
    let is_tool = |name: &&&str| {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        !std::env::split_paths(&paths).any(|dir| dir.join(name).is_file())
    };
    let tools = ["setpriv", "unshare", "losetup", "mount", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "xfs_io", "strace"];
    let mut missing: Vec<&str> = tools.iter().filter(is_tool).copied().collect();
    if !rustix::process::geteuid().is_root() {
        missing.push("root");
    }
    missing.extend(["/dev/fuse", "/dev/loop-control"].iter().filter(|path| !Path::new(path).exists()));
    missing
}

/// One run of the rig, and what came of it.
struct Run {
    args: Args,
    random: Rng,
    dir: PathBuf,
    _kept: tempfile::TempDir,
    images: ProgressBar,
    file_systems: u64,
    checks: u64,
    images_checked: u64,
    lost: u64,
    signals: u64,
}

impl Run {
    fn new(args: &Args) -> Result<Run> {
        let seed = args.seed.unwrap_or_else(|| Rng::new().u64(..));
        eprintln!("filesystems: --seed {seed}");
        let kept = tempfile::Builder::new().prefix("oncekey-filesystems-").tempdir()?;
        let style = ProgressStyle::with_template("{elapsed:>4} {bar:40} {pos}/{len} images, {msg}")?;
        Ok(Run {
            args: args.clone(),
            random: Rng::with_seed(seed),
            dir: kept.path().to_owned(),
            _kept: kept,
            images: ProgressBar::new(0).with_style(style),
            file_systems: 0,
            checks: 0,
            images_checked: 0,
            lost: 0,
            signals: 0,
        })
    }

    /// Returns whether nothing was violated.
    fn all(mut self) -> Result<bool> {
        let kinds = if self.args.only.is_empty() { Kind::ALL.to_vec() } else { self.args.only.clone() };
        let disks = kinds.iter().filter(|kind| kind.has_device()).count() as u64;
        self.images.set_length(if self.wants(Check::Cuts) { disks * self.args.images } else { 0 });
        for kind in kinds {
            self.file_system(kind).map_err(|error| format!("{}: {error}", kind.name()))?;
        }
        self.images.finish_and_clear();
        let Run { file_systems, checks, images_checked, lost, signals, .. } = self;
        println!(
            "file systems {file_systems}, checks {checks}, images {images_checked}, lost {lost}, signals {signals}"
        );
        Ok(lost == 0 && signals == 0)
    }

    fn wants(&self, check: Check) -> bool {
        self.args.checks.is_empty() || self.args.checks.contains(&check)
    }

    fn file_system(&mut self, kind: Kind) -> Result<()> {
        self.file_systems += 1;
        let home = self.dir.join(kind.name());
        let at = home.join("mounted");
        if !kind.has_device() {
            let ground = Ground { kind, file: None, at };
            self.scenes(&ground, None)?;
            return if self.wants(Check::Calls) { self.calls(&ground, None) } else { Ok(()) };
        }
        let (device, fresh) = kind.make(&home.join("served"))?;
        let ground = Ground { kind, file: Some(device.file().to_owned()), at };
        self.scenes(&ground, Some((&device, &fresh)))?;
        if kind == Kind::Reflink {
            return Ok(());
        }
        if self.wants(Check::Calls) {
            self.calls(&ground, Some((&device, &fresh)))?;
        }
        if self.wants(Check::Cuts) {
            self.images.set_message(format!("{}: power cuts", kind.name()));
            self.checks += 1;
            cuts::cut_power(self, &ground, &device, &fresh, self.args.images)?;
        }
        Ok(())
    }

    fn myself(&self, role: &str) -> Command {
        // This executable may be replaced while it runs; the link is to what runs.
        let mut command = Command::new("/proc/self/exe");
        command.arg(role);
        command
    }

    /// Notes that something was lost or wrong.
    fn violated(&mut self, what: &str, error: &(dyn std::error::Error + 'static)) {
        self.images.suspend(|| eprintln!("VIOLATED {what}: {error}"));
        if error.is::<child::Died>() {
            self.signals += 1;
        } else {
            self.lost += 1;
        }
    }
}

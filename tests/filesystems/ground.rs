//! The file systems, made and mounted by their own tools.

use crate::Result;
use crate::device::{Device, Image};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Written to through a mapping.
    Ext4,
    /// Can share blocks between files, so it is written to with `pwrite`.
    Xfs,
    /// Never overwrites in place.
    Btrfs,
    /// In memory, of a fixed size.
    Tmpfs,
    /// xfs, with a store all of whose blocks are shared with a copy.
    Reflink,
}

impl Kind {
    pub const ALL: [Kind; 5] = [Kind::Ext4, Kind::Xfs, Kind::Btrfs, Kind::Tmpfs, Kind::Reflink];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
            Kind::Btrfs => "btrfs",
            Kind::Tmpfs => "tmpfs",
            Kind::Reflink => "reflink",
        }
    }

    pub fn has_device(self) -> bool {
        self != Kind::Tmpfs
    }

    /// The least that its tools accept, or a bit more.
    fn disk_len(self) -> u64 {
        match self {
            Kind::Ext4 => 64 * MIB,
            Kind::Xfs | Kind::Reflink => 300 * MIB,
            Kind::Btrfs => 160 * MIB,
            Kind::Tmpfs => 0,
        }
    }

    fn mkfs(self) -> &'static [&'static str] {
        match self {
            Kind::Ext4 => {
                &["mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-J", "size=4"]
            }
            Kind::Xfs | Kind::Reflink => &["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"],
            // Mixed: what ballast takes and gives back is room for metadata too.
            Kind::Btrfs => &["mkfs.btrfs", "-q", "-f", "-K", "--mixed", "-m", "single", "-d", "single"],
            Kind::Tmpfs => &[],
        }
    }

    /// The kernel's name for it, and options to mount it with.
    fn mount_words(self) -> (&'static str, &'static str) {
        match self {
            Kind::Ext4 => ("ext4", "errors=remount-ro,nodiscard"),
            Kind::Xfs | Kind::Reflink => ("xfs", "nodiscard"),
            Kind::Btrfs => ("btrfs", "nodiscard"),
            Kind::Tmpfs => ("tmpfs", "size=48m,nr_inodes=400"),
        }
    }

    /// An empty file system of this kind on a disk in the directory; and its image, to start from again.
    pub fn make(self, dir: &Path) -> Result<(Device, Image)> {
        let device = Device::serve(Image::blank(self.disk_len()), dir)?;
        run(self.mkfs(), &[device.file()])?;
        let image = device.image();
        device.load(image.clone());
        Ok((device, image))
    }
}

/// A file system and where it is mounted.
#[derive(Clone)]
pub struct Ground {
    pub kind: Kind,
    /// The file that is its disk, where it has one.
    pub file: Option<PathBuf>,
    pub at: PathBuf,
}

impl Ground {
    pub fn mount(&self) -> Result<()> {
        self.mount_with("rw")
    }

    pub fn mount_with(&self, option: &str) -> Result<()> {
        std::fs::create_dir_all(&self.at)?;
        let (name, options) = self.kind.mount_words();
        let options = format!("{options},{option}");
        let mount = |source: &Path| run(&["mount", "-t", name, "-o", &options], &[source, &self.at]);
        let Some(file) = &self.file else { return mount(Path::new("oncekey")).map(|_| ()) };
        let looped = run(&["losetup", "--find", "--show", "--direct-io=on"], &[file])?;
        let looped = Path::new(looped.trim());
        let mounted = mount(looped);
        // It stays as long as it is mounted, and goes with the mount.
        run(&["losetup", "--detach"], &[looped])?;
        mounted.map(|_| ())
    }

    pub fn remount(&self, option: &str) -> Result<()> {
        run(&["mount", "-o", &format!("remount,{option}")], &[&self.at]).map(|_| ())
    }

    pub fn unmount(&self) -> Result<()> {
        run(&["umount"], &[&self.at]).map(|_| ())
    }

    pub fn store(&self) -> PathBuf {
        self.at.join("store")
    }
}

/// Runs a tool; what it printed.
pub fn run(words: &[&str], paths: &[&Path]) -> Result<String> {
    let output = Command::new(words[0]).args(&words[1..]).args(paths).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} {paths:?}: {}, {}", words.join(" "), output.status, said.trim()).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

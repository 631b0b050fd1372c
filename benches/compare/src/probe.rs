//! What the kernel counts: memory, allocated blocks, bytes written.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A line's number in a file of `/proc` such as `RssAnon:   1234 kB`.
fn number_in(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Anonymous memory of a process, in bytes.
pub fn anonymous_bytes(process: u32) -> u64 {
    number_in(&format!("/proc/{process}/status"), "RssAnon:").map_or(0, |kib| kib * 1024)
}

/// Bytes that a process caused to be written: pages are counted when they become dirty, each time.
pub fn written_bytes(process: u32) -> Option<u64> {
    number_in(&format!("/proc/{process}/io"), "write_bytes:")
}

/// Bytes that a directory's device was sent so far, by whomever; `None` if there is no such device.
pub fn device_bytes(dir: &Path) -> Option<u64> {
    let device = fs::metadata(dir).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let counts = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    Some(counts.split_whitespace().nth(6)?.parse::<u64>().ok()? * 512)
}

/// Bytes allocated to all files below a directory.
pub fn allocated_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => allocated_bytes(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            // Gone since.
            Err(_) => 0,
        })
        .sum()
}

/// Has the file system write all it holds back.
pub fn sync_all(dir: &Path) -> std::io::Result<()> {
    Ok(rustix::fs::syncfs(fs::File::open(dir)?)?)
}

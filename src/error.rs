//! The one error type: what happened, to which file, and what to do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result of a fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation could not be carried out.
///
/// Answers such as "in flight" or "another payload" are not errors; see [`Outcome`](crate::Outcome).
/// [`kind`](Error::kind) says which class of failure it is; the text names the file, the offset or the limit.
#[derive(thiserror::Error)]
#[error(transparent)]
pub struct Error(Box<Repr>);

#[derive(Debug, thiserror::Error)]
struct Repr {
    kind: ErrorKind,
    message: String,
    place: Option<Place>,
    #[source]
    source: Option<io::Error>,
}

#[derive(Debug)]
struct Place {
    path: PathBuf,
    offset: Option<u64>,
}

/// The classes of failure.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The operating system refused a read, a write or a directory operation.
    Io,
    /// The disk, a quota or a file-size limit leaves no room for another journal segment.
    StorageFull,
    /// `max_keys` or `max_bytes` is reached; live keys are never evicted to make room.
    Full,
    /// Bytes that were made durable are damaged or missing.
    Corrupt,
    /// The store was written by a newer format than this build reads.
    UnsupportedVersion,
    /// Another process, or another handle of this process, has the store open.
    Locked,
    /// An earlier write or sync failed, so nothing more can be promised; reopen the store.
    Poisoned,
    /// The reservation is no longer the key's: it was taken over, erased or released.
    Fenced,
    /// The store was closed.
    Closed,
    /// The store was opened by the parent of this process; a child has to open its own.
    Forked,
    /// The key is empty or longer than `max_key_len`.
    InvalidKey,
    /// The answer or recovery point is longer than `max_record_len`.
    RecordTooLarge,
    /// A setting is out of its range.
    InvalidArgument,
    /// A caller holds on to bytes that have to be erased.
    Busy,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error(Box::new(Repr { kind, message: message.into(), place: None, source: None }))
    }

    /// An I/O failure while `doing`; a full disk or quota gets its own kind.
    pub(crate) fn io(doing: &str, path: &Path, source: io::Error) -> Self {
        let is_full = matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        );
        let kind = if is_full { ErrorKind::StorageFull } else { ErrorKind::Io };
        Error(Box::new(Repr {
            kind,
            message: format!("can't {doing}"),
            place: Some(Place { path: path.to_owned(), offset: None }),
            source: Some(source),
        }))
    }

    pub(crate) fn corrupt(path: &Path, offset: u64, message: impl Into<String>) -> Self {
        Error::new(ErrorKind::Corrupt, message).at(path, Some(offset))
    }

    pub(crate) fn at(mut self, path: &Path, offset: Option<u64>) -> Self {
        self.0.place = Some(Place { path: path.to_owned(), offset });
        self
    }

    pub(crate) fn poisoned(reason: &str) -> Self {
        Error::new(
            ErrorKind::Poisoned,
            format!(
                "the journal failed ({reason}), so whether this operation was recorded is unknown; \
                 reads go on, but reopen the store before writing"
            ),
        )
    }

    pub(crate) fn fenced(fence: u64) -> Self {
        Error::new(
            ErrorKind::Fenced,
            format!("reservation {fence} is no longer the owner of its key; do not apply its result"),
        )
    }

    pub(crate) fn closed() -> Self {
        Error::new(ErrorKind::Closed, "the store was closed; open it again")
    }

    /// The class of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file or directory concerned, where there is one.
    pub fn path(&self) -> Option<&Path> {
        self.0.place.as_ref().map(|place| place.path.as_path())
    }

    /// The byte offset in [`path`](Error::path), where damage was found.
    pub fn offset(&self) -> Option<u64> {
        self.0.place.as_ref().and_then(|place| place.offset)
    }

    /// Whether the caller lost its reservation.
    pub fn is_fenced(&self) -> bool {
        self.kind() == ErrorKind::Fenced
    }

    /// Whether a limit or the disk is exhausted, so that the same call can succeed later.
    pub fn is_full(&self) -> bool {
        matches!(self.kind(), ErrorKind::Full | ErrorKind::StorageFull)
    }
}

impl fmt::Display for Repr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(place) = &self.place {
            write!(f, " ({}", place.path.display())?;
            if let Some(offset) = place.offset {
                write!(f, " at offset {offset}")?;
            }
            f.write_str(")")?;
        }
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {})", self.0.kind, self.0)
    }
}

//! Bugs planted on purpose, so that the rigs can show that they catch them (`make planted`).
//!
//! Only builds with `--cfg oncekey_planted` have them. There the environment variable `ONCEKEY_PLANTED` names the one that is
//! active; in all other builds `planted!` is `false`.

/// Whether a bug is planted.
#[cfg(oncekey_planted)]
macro_rules! planted {
    ($bug:ident) => {
        $crate::planted::is_active($crate::planted::Bug::$bug)
    };
}

#[cfg(not(oncekey_planted))]
macro_rules! planted {
    ($bug:ident) => {
        false
    };
}

#[cfg(oncekey_planted)]
pub(crate) use active::is_active;
#[cfg(oncekey_planted)]
pub use active::{Bug, VARIABLE};

#[cfg(oncekey_planted)]
mod active {
    use std::sync::LazyLock;

    /// The environment variable that names the active bug.
    pub const VARIABLE: &str = "ONCEKEY_PLANTED";

    macro_rules! bugs {
        ($($(#[$doc:meta])+ $bug:ident,)+) => {
            /// A bug that can be planted.
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub enum Bug { $($(#[$doc])+ $bug,)+ }

            impl Bug {
                /// All of them.
                pub const ALL: &[Bug] = &[$(Bug::$bug),+];
            }
        };
    }

    bugs! {
        /// A new segment is used before its name in the directory is synced.
        NewNameNotSynced,
        /// A new file gets its name before its bytes are synced.
        RenamedBeforeSync,
        /// A synced operation is acknowledged before the sync that covers it.
        AckedBeforeSync,
        /// A sync that failed is tried again, and believed.
        SyncRetried,
        /// Nobody is woken to lead the next round of syncs.
        LeaderNotWoken,
        /// A record counts as written while those before it are not.
        HoleAcknowledged,
        /// A key that is gone still counts under `max_keys`.
        KeyNotUncounted,
        /// A record is published, and then its bytes are copied.
        PublishedBeforeWritten,
        /// Checksums start from the store's id alone, the same in each segment.
        SegmentUnbound,
        /// The checksum of a record's header is not compared.
        HeaderUnchecked,
        /// The checksum of key and payload is not compared.
        BodyUnchecked,
        /// Whatever is unreadable at the end of a segment is taken for a torn tail.
        DurableTailCut,
        /// Numbers go on from the newest segment with records, and fences with them.
        NumbersReused,
        /// Of a key's records recovery takes the one that it reads last.
        LastReadWins,
        /// Recovery reads over releases.
        ReleaseForgotten,
        /// An answer whose erasure a crash cut short stays once the key was used anew.
        StrayKept,
        /// Recovery trusts the page cache with what an earlier sync may have failed to write.
        UnsyncedAccepted,
        /// Recovery seals a segment before its records are synced.
        SealedBeforeSync,
        /// Recovery takes a seal for whole whose copy in the segment's head is missing.
        HeadSealNotRepeated,
        /// A segment's file is removed before the list says so.
        FileBeforeList,
        /// The list of segments is written, and not synced.
        ListNotSynced,
        /// Both slots of the list are written before either is synced.
        ListCopiedBeforeSync,
        /// A used segment becomes a spare without being declared void first.
        HeaderNotVoided,
        /// A record that upkeep moved is not counted as alive where it is now.
        CopyNotCounted,
        /// The original goes before its copy is durable.
        CopyNotSynced,
        /// A synced reservation goes before the answer that took its place is durable.
        PromiseForgotten,
        /// Reservations segments go in any order, releases before what they mask.
        ReleaseDroppedEarly,
        /// Expired answers go before the reservations that they mask.
        AnswerDroppedEarly,
        /// Records are overwritten before the note of that is durable.
        NoteNotSynced,
        /// An erasure returns before what it overwrote is synced.
        ErasureNotSynced,
        /// What was promised of a record is not promised of those that take its place.
        PromiseNotInherited,
        /// The erasure of a scope looks for a key again with each of its records.
        KeyErasedTwice,
        /// An erasure passes over records that no slot can stand for.
        ReleaseNotErased,
        /// The lock is let go between the look for a key and its reservation, to read the clock.
        LockDropped,
        /// Keys of one hash are taken for one key.
        HashTrusted,
        /// Whoever comes back to a key that was taken over writes as its owner.
        FenceUnchecked,
        /// `get` returns answers whose retention is over.
        ExpiredReturned,
        /// What ends now ends a millisecond later.
        ExpiresLate,
        /// A retention that ends later than time does wraps around.
        DeadlineWraps,
        /// Recovery points of one reservation all have the same number.
        PointsNotNumbered,
        /// A released key stays as if its owner had vanished.
        ReleaseKeepsKey,
        /// A guard that is dropped wakes nobody.
        WaiterNotWoken,
        /// An index counts before what it leaves to the journal is durable.
        IndexBeforeSync,
        /// An index counts on while records are overwritten.
        IndexKept,
        /// An index covers an owner's verdict and has what its key's slot pointed to before.
        VerdictNotAwaited,
        /// An index covers answers whose reservations it leaves to the journal.
        MasksIgnored,
        /// Closing the store leaves those asleep who wait for an owner.
        CloseWakesNobody,
    }

    static ACTIVE: LazyLock<Option<Bug>> = LazyLock::new(|| {
        let name = std::env::var(VARIABLE).ok()?;
        let found = Bug::ALL.iter().find(|bug| format!("{bug:?}") == name);
        if found.is_none() {
            // No panic: a rig could take it for what it looks for.
            eprintln!("{VARIABLE}: there is no bug {name:?}; there are {:?}", Bug::ALL);
            std::process::exit(2);
        }
        found.copied()
    });

    #[inline]
    pub(crate) fn is_active(bug: Bug) -> bool {
        *ACTIVE == Some(bug)
    }
}

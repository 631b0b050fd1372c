//! Which rig catches which bug.

use oncekey::testing::Bug;

/// A rig, as it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rig {
    Sim,
    Linear,
    Kills,
    /// Integration tests whose names begin so.
    Tests(&'static str),
}

pub fn catcher(bug: Bug) -> Rig {
    use Bug::*;
    match bug {
        NewNameNotSynced | AckedBeforeSync | SyncRetried | SegmentUnbound | HeaderUnchecked | BodyUnchecked
        | DurableTailCut | NumbersReused | LastReadWins | ReleaseForgotten | UnsyncedAccepted | SealedBeforeSync
        | FileBeforeList | ListNotSynced | ListCopiedBeforeSync | HeaderNotVoided | CopyNotCounted
        | PromiseForgotten | ReleaseDroppedEarly | AnswerDroppedEarly | ErasureNotSynced | ReleaseNotErased
        | HashTrusted | FenceUnchecked | ExpiredReturned | ExpiresLate | DeadlineWraps | PointsNotNumbered
        | ReleaseKeepsKey | WaiterNotWoken | CloseWakesNobody | HeadSealNotRepeated => Rig::Sim,
        PublishedBeforeWritten | LockDropped | LeaderNotWoken => Rig::Linear,
        HoleAcknowledged => Rig::Kills,
        NoteNotSynced => Rig::Tests("recovery::no_power_cut"),
        CopyNotSynced => Rig::Tests("space::"),
        StrayKept => Rig::Tests("erasure::"),
    }
}

impl Rig {
    /// The test target that it is.
    pub fn target(self) -> &'static str {
        match self {
            Rig::Sim => "sim",
            Rig::Linear => "linear",
            Rig::Kills => "torture",
            Rig::Tests(_) => "all",
        }
    }

    pub fn arguments(self) -> Vec<&'static str> {
        match self {
            Rig::Sim => vec!["--seeds", "60", "--threads", "1"],
            Rig::Linear => vec!["--seed", "0", "--histories", "40000", "--patience", "10"],
            Rig::Kills => vec!["--seed", "0", "--strace", "off", "--cycles", "60", "--acks", "0"],
            Rig::Tests(names) => vec![names, "--test-threads", "1"],
        }
    }

    /// Whether it wants all processors for itself.
    pub fn is_threaded(self) -> bool {
        matches!(self, Rig::Linear | Rig::Kills)
    }

    /// The exit code that stands for a violation, and what the line begins with that says which.
    pub fn violation(self) -> (i32, &'static [&'static str]) {
        match self {
            Rig::Sim => (1, &["tests/sim/world.rs:"]),
            Rig::Linear => (1, &["violated: ", "not linearizable:"]),
            Rig::Kills => (1, &["torture: Lost: ", "torture: Double: ", "torture: Back: "]),
            Rig::Tests(_) => (101, &["test result: FAILED"]),
        }
    }
}

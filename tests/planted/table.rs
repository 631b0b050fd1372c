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
        NewNameNotSynced | RenamedBeforeSync | AckedBeforeSync | SyncRetried | SegmentUnbound | HeaderUnchecked
        | BodyUnchecked | DurableTailCut | NumbersReused | LastReadWins | ReleaseForgotten | UnsyncedAccepted
        | SealedBeforeSync | FileBeforeList | ListNotSynced | ListCopiedBeforeSync | HeaderNotVoided
        | CopyNotCounted | PromiseForgotten | ReleaseDroppedEarly | AnswerDroppedEarly | ErasureNotSynced
        | ReleaseNotErased | HashTrusted | FenceUnchecked | ExpiredReturned | ExpiresLate | DeadlineWraps
        | PointsNotNumbered | KeyNotUncounted | ReleaseKeepsKey | WaiterNotWoken | CloseWakesNobody | IndexKept => {
            Rig::Sim
        }
        PublishedBeforeWritten | LockDropped | LeaderNotWoken => Rig::Linear,
        HoleAcknowledged => Rig::Kills,
        KeyErasedTwice => Rig::Tests("erasure::an_answer_stored"),
        NoteNotSynced => Rig::Tests("recovery::no_power_cut"),
        HeadSealNotRepeated => Rig::Tests("recovery::recovery_cut_off"),
        PromiseNotInherited => Rig::Tests("space::a_key_whose_copy"),
        CopyNotSynced => Rig::Tests("space::a_segment_that_dies"),
        StrayKept => Rig::Tests("erasure::a_key_used_anew"),
        IndexBeforeSync => Rig::Tests("index::no_power_cut"),
        VerdictNotAwaited => Rig::Tests("index::answers_acknowledged"),
        MasksIgnored => Rig::Tests("index::an_answer_that_is_over"),
    }
}

impl Rig {
    pub fn name(self) -> &'static str {
        match self {
            Rig::Tests(names) => names,
            Rig::Sim | Rig::Linear | Rig::Kills => self.target(),
        }
    }

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
            Rig::Sim => vec!["--seeds", "60", "--threads", "1", "--patience", "8"],
            Rig::Linear => vec!["--seed", "0", "--histories", "8000", "--patience", "10"],
            // A hole shows once in some 100,000 acknowledgements.
            Rig::Kills => vec!["--seed", "0", "--strace", "off", "--cycles", "60", "--acks", "1500000"],
            Rig::Tests(names) => vec![names, "--test-threads", "1"],
        }
    }

    /// Whether it wants all processors for itself.
    pub fn is_threaded(self) -> bool {
        matches!(self, Rig::Linear | Rig::Kills)
    }

    /// The exit code that stands for a violation.
    pub fn code(self) -> i32 {
        match self {
            Rig::Sim | Rig::Linear | Rig::Kills => 1,
            Rig::Tests(_) => 101,
        }
    }

    /// What a rig said of a violation, in a line, if it found one: no crash of the engine, and no trouble of the rig's own.
    pub fn verdict(self, said: &str) -> Option<String> {
        let find = |beginnings: &[&str]| {
            said.lines().find(|line| beginnings.iter().any(|beginning| line.starts_with(beginning))).map(str::to_owned)
        };
        match self {
            Rig::Sim => find(&["tests/sim/world.rs:", "violated: "]),
            Rig::Linear => find(&["violated: "]).or_else(|| {
                let (short, _) = said.split_once("\nall of it:\n")?;
                let (_, told) = short.lines().last()?.split_once("] ")?;
                Some(format!("not linearizable: ends with {}", told.trim()))
            }),
            Rig::Kills => find(&["torture: Lost: ", "torture: DoubleGrant: ", "torture: FenceWentBack: "]),
            Rig::Tests(_) => {
                let mut lines = said.lines().skip_while(|line| !line.contains("panicked at tests/all/"));
                lines.nth(1).map(str::to_owned)
            }
        }
    }
}

//! The life of a key, as one pure function that live code and recovery both call.
//!
//! A key is vacant, reserved by one owner, completing (its owner's verdict is on its way into the journal), completed,
//! or interrupted (its owner is gone and nobody knows whether the side effect happened). [`step`] says for each state
//! and event what follows; it reads no clock and touches nothing.
//!
//! - **S1** The fingerprint is checked before anything else: a caller with another payload learns nothing but that.
//! - **S2** A write of an owner counts only with the fence of the reservation that holds the key; the fence decides, not
//!   the clock, so an owner whose lease ran out may still complete while nobody took its key.
//! - **S3** While a verdict is being written the key can't be taken over, however long the write takes.
//! - **S4** Recovery is order-independent: of all records of a key the one with the highest (fence, rank) wins.

/// What a slot's word says of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Nobody holds the key.
    Vacant = 0,
    /// One owner runs the operation.
    Reserved = 1,
    /// The owner's verdict (or recovery point) is being written.
    Completing = 2,
    /// The answer is stored.
    Completed = 3,
    /// The owner is gone without a verdict.
    Interrupted = 4,
    /// Only while a journal is read: a released key, kept to mask its older records.
    Released = 5,
}

impl Phase {
    #[cfg(test)]
    pub(crate) const ALL: [Phase; 6] =
        [Phase::Vacant, Phase::Reserved, Phase::Completing, Phase::Completed, Phase::Interrupted, Phase::Released];

    /// Reads the three low bits of a slot's word.
    #[inline]
    pub(crate) fn from_bits(bits: u64) -> Phase {
        match bits {
            0 => Phase::Vacant,
            1 => Phase::Reserved,
            2 => Phase::Completing,
            3 => Phase::Completed,
            4 => Phase::Interrupted,
            _ => Phase::Released,
        }
    }
}

/// A key's state with what decides its transitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// Where the key stands.
    pub phase: Phase,
    /// Number of the reservation that the state stems from.
    pub fence: u64,
    /// End of the lease when reserved, of the retention when completed, in Unix ms; `u64::MAX` is never.
    pub deadline_ms: u64,
}

/// What happens to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Somebody asks for the key; `matches` says whether the fingerprint is the stored one.
    Reserve {
        /// Whether the caller's fingerprint is the stored one.
        matches: bool,
    },
    /// The owner starts to write a verdict or a recovery point.
    Begin(u64),
    /// The owner's answer is in the journal.
    Complete(u64),
    /// The owner's "did not happen" is in the journal.
    Release(u64),
    /// The owner's recovery point is in the journal, or its verdict could not be written.
    Resume(u64),
    /// The owner asks for a new lease.
    Renew(u64),
    /// The owner is gone without a verdict.
    Abandon(u64),
    /// The time is now this many Unix ms.
    Elapse(u64),
    /// The key is to be forgotten, whatever its state.
    Erase,
    /// Recovery reads a record of the key.
    Recover(Recovered),
}

/// What a journal record says of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Reserved, completed or released.
    pub phase: Phase,
    /// Number of the reservation that wrote the record.
    pub fence: u64,
    /// Recovery points written before, within the reservation.
    pub sequence: u32,
    /// `sequence` of the record that the state stems from so far.
    pub known_sequence: u32,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transition {
    /// The key is in another phase, or in the same one for a new reason.
    To(Phase),
    /// Nothing changes.
    Stay,
    /// Nothing changes; the caller gets the stored answer.
    Replay,
    /// Nothing changes; somebody else runs the operation.
    InFlight,
    /// Nothing changes; the key was used with another payload.
    Mismatch,
    /// Nothing changes; the writer is not the owner any more.
    Fenced,
}

/// Whether an answer that is kept until then is over.
pub(crate) fn is_over(kept_until_ms: u64, now_ms: u64) -> bool {
    let state = State { phase: Phase::Completed, fence: 0, deadline_ms: kept_until_ms };
    step(state, Event::Elapse(now_ms)) == Transition::To(Phase::Vacant)
}

/// The transition function.
///
/// Callers know the event, which leaves little of it in each of them.
#[inline(always)]
pub(crate) fn step(state: State, event: Event) -> Transition {
    use Phase::*;
    use Transition::*;
    let is_current = |fence: u64| fence == state.fence || planted!(FenceUnchecked);
    let owned = |fence: u64| is_current(fence) && matches!(state.phase, Reserved | Interrupted);
    let writing = |fence: u64| is_current(fence) && state.phase == Completing;
    match event {
        Event::Reserve { matches } => match state.phase {
            Vacant | Released => To(Reserved),
            Reserved | Completing | Completed | Interrupted if !matches => Mismatch,
            Reserved | Completing => InFlight,
            Completed => Replay,
            Interrupted => To(Reserved),
        },
        Event::Begin(fence) if owned(fence) => To(Completing),
        Event::Renew(fence) if owned(fence) => To(Reserved),
        Event::Complete(fence) if writing(fence) => To(Completed),
        Event::Release(fence) if writing(fence) => To(Vacant),
        Event::Resume(fence) if writing(fence) => To(Reserved),
        Event::Abandon(fence) if owned(fence) => To(Interrupted),
        Event::Begin(_)
        | Event::Renew(_)
        | Event::Complete(_)
        | Event::Release(_)
        | Event::Resume(_)
        | Event::Abandon(_) => Fenced,
        Event::Elapse(now_ms) if state.deadline_ms > now_ms => Stay,
        Event::Elapse(now_ms) if planted!(ExpiresLate) && state.deadline_ms == now_ms => Stay,
        Event::Elapse(_) => match state.phase {
            Reserved => To(Interrupted),
            Completed | Released => To(Vacant),
            Vacant | Completing | Interrupted => Stay,
        },
        Event::Erase => To(Vacant),
        Event::Recover(seen) => {
            let known = precedence(state.fence, state.phase, seen.known_sequence);
            let is_higher = precedence(seen.fence, seen.phase, seen.sequence) > known || planted!(LastReadWins);
            if state.phase == Vacant || is_higher { To(seen.phase) } else { Stay }
        }
    }
}

/// Of all records of a key the one where this is highest counts: a verdict outranks its reservation.
pub(crate) fn precedence(fence: u64, phase: Phase, sequence: u32) -> (u64, u8, u32) {
    let rank = match phase {
        Phase::Vacant => 0,
        Phase::Reserved | Phase::Completing | Phase::Interrupted => 1,
        Phase::Completed | Phase::Released => 2,
    };
    (fence, rank, sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u64 = 40;
    const OLD: u64 = 32;
    const NOW: u64 = 1_000;

    fn state(phase: Phase, deadline_ms: u64) -> State {
        State { phase, fence: OWN, deadline_ms }
    }

    /// The whole table, spelt out: a row a (state, event), written from the promises and not from the code.
    #[test]
    fn every_state_answers_every_event_as_promised() {
        use Phase::*;
        use Transition::*;
        let events = [
            Event::Reserve { matches: true },
            Event::Reserve { matches: false },
            Event::Begin(OWN),
            Event::Complete(OWN),
            Event::Release(OWN),
            Event::Resume(OWN),
            Event::Renew(OWN),
            Event::Abandon(OWN),
            Event::Elapse(NOW - 1),
            Event::Elapse(NOW),
            Event::Erase,
        ];
        #[rustfmt::skip]
        let table: [(Phase, [Transition; 11]); 6] = [
            //             same fp        other fp      begin           complete       release     resume        renew         abandon          early  late             erase
            (Vacant,      [To(Reserved), To(Reserved), Fenced,         Fenced,        Fenced,     Fenced,       Fenced,       Fenced,          Stay,  Stay,            To(Vacant)]),
            (Reserved,    [InFlight,     Mismatch,     To(Completing), Fenced,        Fenced,     Fenced,       To(Reserved), To(Interrupted), Stay,  To(Interrupted), To(Vacant)]),
            (Completing,  [InFlight,     Mismatch,     Fenced,         To(Completed), To(Vacant), To(Reserved), Fenced,       Fenced,          Stay,  Stay,            To(Vacant)]),
            (Completed,   [Replay,       Mismatch,     Fenced,         Fenced,        Fenced,     Fenced,       Fenced,       Fenced,          Stay,  To(Vacant),      To(Vacant)]),
            (Interrupted, [To(Reserved), Mismatch,     To(Completing), Fenced,        Fenced,     Fenced,       To(Reserved), To(Interrupted), Stay,  Stay,            To(Vacant)]),
            (Released,    [To(Reserved), To(Reserved), Fenced,         Fenced,        Fenced,     Fenced,       Fenced,       Fenced,          Stay,  To(Vacant),      To(Vacant)]),
        ];
        assert_eq!(table.map(|(phase, _)| phase), Phase::ALL);
        for (phase, answers) in table {
            for (event, answer) in events.into_iter().zip(answers) {
                assert_eq!(step(state(phase, NOW), event), answer, "{phase:?} on {event:?}");
            }
        }
    }

    #[test]
    fn a_write_with_an_older_fence_changes_nothing_in_any_state() {
        for phase in Phase::ALL {
            for event in [
                Event::Begin(OLD),
                Event::Complete(OLD),
                Event::Release(OLD),
                Event::Resume(OLD),
                Event::Renew(OLD),
                Event::Abandon(OLD),
            ] {
                assert_eq!(step(state(phase, NOW), event), Transition::Fenced, "{phase:?} on {event:?}");
            }
        }
    }

    #[test]
    fn a_state_without_end_never_elapses() {
        for phase in Phase::ALL {
            let forever = state(phase, u64::MAX);
            assert_eq!(step(forever, Event::Elapse(u64::MAX - 1)), Transition::Stay, "{phase:?}");
        }
    }

    #[test]
    fn recovery_ends_in_the_same_state_whatever_the_order_of_records() {
        let records = [
            (Phase::Reserved, 8, 0),
            (Phase::Reserved, 8, 1),
            (Phase::Released, 8, 0),
            (Phase::Reserved, 16, 0),
            (Phase::Reserved, 16, 1),
            (Phase::Completed, 16, 0),
        ];
        let replay = |order: &[usize]| {
            let mut state = State { phase: Phase::Vacant, fence: 0, deadline_ms: u64::MAX };
            let mut known_sequence = 0;
            for &at in order {
                let (phase, fence, sequence) = records[at];
                let seen = Recovered { phase, fence, sequence, known_sequence };
                if let Transition::To(phase) = step(state, Event::Recover(seen)) {
                    state = State { phase, fence, deadline_ms: u64::MAX };
                    known_sequence = sequence;
                }
            }
            (state.phase, state.fence, known_sequence)
        };
        let mut order: Vec<usize> = (0..records.len()).collect();
        let mut seen = 0;
        permute(&mut order, 0, &mut |order| {
            seen += 1;
            assert_eq!(replay(order), (Phase::Completed, 16, 0), "{order:?}");
            let unfinished: Vec<usize> = order.iter().copied().filter(|&at| at != 5).collect();
            assert_eq!(replay(&unfinished), (Phase::Reserved, 16, 1), "{unfinished:?}");
            let released: Vec<usize> = order.iter().copied().filter(|&at| at < 3).collect();
            assert_eq!(replay(&released), (Phase::Released, 8, 0), "{released:?}");
        });
        assert_eq!(seen, 720);
    }

    fn permute(items: &mut [usize], from: usize, each: &mut impl FnMut(&[usize])) {
        if from == items.len() {
            return each(items);
        }
        for at in from..items.len() {
            items.swap(from, at);
            permute(items, from + 1, each);
            items.swap(from, at);
        }
    }
}

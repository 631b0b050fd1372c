//! From what a crash left to a store that can go on.
//!
//! Recovery reads every segment, then decides, and only then writes: if anything was found that has to be refused, no
//! byte was changed. It reads with `read`, not through a mapping. What it decides, by case:
//!
//! | case | found | meaning | done |
//! |---|---|---|---|
//! | A | a name ending in `.new` | a file whose making was cut short; it never had a record | removed |
//! | B | a segment of another length, or with a damaged header | corruption | refused |
//! | C | a whole header of another store or place, of a newer version or with unknown features | not ours to read or to write over | refused, also in salvage |
//! | D | zeros up to the end, from no lower than the durable mark on | space not yet written | nothing |
//! | E | a segment without any record, or whose header says that it is void | a spare, or all of it was lost | one is kept to become a spare of a higher number, others are removed |
//! | F | a gap that lies in records which an erasure had begun to overwrite | the erasure was cut short | overwritten |
//! | G | a gap or the records' end below the durable mark, or a gap before a seal | corruption | refused |
//! | H | any other gap | written but never synced, or claimed and not written when the process died | padded, or cut at the end |
//! | I | a segment without a seal | was in use | what is above its mark written once more; synced, sealed |
//! | J | bytes behind a seal | what case H cut, and a failed sync left there | cut again |
//! | K | a segment with its seal and no gap | ended well | nothing; if the head does not repeat the seal, that is done |
//! | L | a segment that is listed and has no file | somebody took it away | refused |
//! | M | a segment with records or damage that is not listed, of a number that may have been | its removal was cut short | removed, and nothing in it counts |
//! | N | a segment with records that is not listed, of a number above all that ever were | the list is not the newest, or the segment was put there | refused |
//! | O | no list that can be read, in a store that has one | corruption | refused |
//! | P | a list in one slot only | a sync was cut short or failed, or the other slot is damaged | written once more, to both |
//! | Q | a store that was made before there were lists | its segments are those found | given a list, then marked as having one |
//!
//! In salvage, B and G are reported and padded over instead: the report lists every byte range given up. So are L and O: the
//! list is written anew, of the segments found. N is accepted.
//!
//! Padding, cutting, overwriting and sealing are idempotent and none grows the store, so a crash during recovery is just
//! another crash. No record is ever given a new checksum for bytes that could not be verified: a pad's payload is zeros.
//!
//! Then each key's state is put together by [`state::step`], in any order of records; reservations without a verdict
//! are interrupted, since their owner is gone.

use crate::error::{Error, ErrorKind, Result};
use crate::journal::codec::{
    BadHeader, Binding, HEAD_MARK, HEADER, Kind, OLD_HEAD_MARK, RecordRef, SEGMENT_HEAD, SEGMENT_HEADER, SegmentHeader,
    encode_blank, encode_mark, header_says,
};
use crate::journal::commit::Poison;
use crate::journal::index::{Covered, Directory, Holds, INDEX_NAME, Index, SHORTEST_RECORD};
use crate::journal::list::{LIST_NAME, Listed, MISSING, SegmentList, Standing};
use crate::journal::media::{Blob, Storage};
use crate::journal::reader::{Gap, Scan, Target, head_is_dirty, scan, scan_in_pieces};
use crate::journal::segment::Segment;
use crate::journal::{Journal, LEAST_SEGMENTS, Options, SegmentMap, Stream, numbers_end, segment_name, segment_number};
use crate::key::Key;
use crate::mmap::{Arena, prefetch};
use crate::shard::{Shard, Sought};
use crate::state::{self, Event, Phase, Recovered, State, Transition};
use crate::store::KeyHasher;
use crate::sync::Mutex;
use crate::table::{Shards, Slot, Word, capacity_for, tag_of};
use crate::wheel::TimerId;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// What to do about damage to what was durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecoveryMode {
    /// Refuse to open, change nothing, and say where it is.
    #[default]
    Strict,
    /// Open with what can be read, and report every byte range that can't.
    Salvage,
}

/// Bytes of a file that hold no readable record.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// The segment's file.
    pub path: PathBuf,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// What is wrong with them.
    pub reason: String,
}

/// What opening a store found and did.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Segments kept.
    pub segments: u64,
    /// Records read: not those that the index stood for.
    pub records: u64,
    /// Keys taken from the index.
    pub indexed: u64,
    /// Keys with an answer that is still kept; some that the index had may be over.
    pub completed: u64,
    /// Keys whose owner vanished.
    pub interrupted: u64,
    /// Keys whose answer's retention was over.
    pub expired: u64,
    /// Remains of writes that were never acknowledged as durable, now cut or padded.
    pub cut: Vec<Damage>,
    /// Durable bytes given up; always empty in strict mode.
    pub lost: Vec<Damage>,
    /// Records of unfinished erasures that were overwritten.
    pub scrubbed: u64,
    /// How far the clock is ahead of the newest record; what expired in between is gone.
    pub clock_ahead: Duration,
    /// How far the clock is behind the newest record; the store's time goes on from there.
    pub clock_behind: Duration,
    /// How long it took.
    pub elapsed: Duration,
}

/// What the store's own file says.
const STORE_NAME: &str = "STORE";
/// Its length: a segment's header with number 0.
const STORE_LEN: u64 = SEGMENT_HEADER as u64;

/// Length of a list of segments as a store begins with, for the report of one that is gone.
const LIST_LEN: u64 = 8192;

/// A store put together from its journal.
pub(crate) struct Recovery {
    pub(crate) journal: Journal,
    pub(crate) hasher: KeyHasher,
    pub(crate) shards: Shards<Shard>,
    pub(crate) arena: Arc<Arena>,
    pub(crate) report: RecoveryReport,
    pub(crate) newest_ms: u64,
    pub(crate) keys: u64,
    /// Records that are beaten by others which may go before them.
    pub(crate) strays: Vec<Target>,
    /// Numbers of the segments that an index stood for.
    pub(crate) spared: BTreeSet<u64>,
}

/// What recovery has to know beside the storage.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) mode: RecoveryMode,
    /// Length of segments for a new store, and whether an existing one has to have it.
    pub(crate) segment_len: u64,
    pub(crate) segment_len_is_set: bool,
    pub(crate) max_bytes: Option<u64>,
    pub(crate) persistent: bool,
    pub(crate) shards: usize,
    /// How many threads may read segments at a time.
    pub(crate) threads: usize,
    pub(crate) hasher: KeyHasher,
    /// Whether an index may stand for segments.
    pub(crate) index: bool,
    /// The id of a new store; drawn at random if there is none.
    pub(crate) new_store_id: Option<[u8; 16]>,
    pub(crate) now_ms: u64,
    pub(crate) clock_jump_limit: Option<Duration>,
}

/// A segment as it was found.
struct Found {
    number: u64,
    base: u64,
    /// What its length is or should be.
    len: u64,
    binding: Binding,
    blob: Arc<dyn Blob>,
    scan: Scan,
    /// Length or header are wrong, so the file has to be written anew (salvage only).
    has_to_be_rebuilt: bool,
}

impl Found {
    /// Whether it may be made a spare: nothing was ever acknowledged in it.
    fn is_spare(&self) -> bool {
        self.scan.is_blank() && self.scan.durable == SEGMENT_HEAD && !self.has_to_be_rebuilt
    }

    /// Its records that aren't known to be durable, if it was in use.
    fn unsynced(&self) -> Option<Range<u64>> {
        let Scan { durable, end, is_sealed, .. } = self.scan;
        (!is_sealed).then(|| durable.clamp(SEGMENT_HEAD, end)..end)
    }
}

pub(crate) fn recover(storage: Arc<dyn Storage>, plan: &Plan) -> Result<Recovery> {
    let started = Instant::now();
    let mut report = RecoveryReport::default();
    let names = storage.list()?;
    let identity = identify(&*storage, &names, plan, &mut report)?;
    let Identity { store_id, segment_len, .. } = identity;
    let list = identity.is_listed.then(|| SegmentList::read(&storage, store_id, segment_len)).transpose()?;
    let listed = list.as_ref().and_then(|list| list.as_ref().ok()).map(SegmentList::listed);
    let index = list.as_ref().and_then(|list| Indexed::open(&*storage, &identity, list.as_ref().ok()?, plan));
    let (mut found, index) = index.map_or((Vec::new(), None), |(found, index)| (found, Some(index)));
    let is_found = |number: &u64| found.binary_search_by_key(number, |segment| segment.number).is_ok();
    let to_read = names.iter().filter_map(|name| segment_number(name)).filter(|number| !is_found(number)).collect();
    let (read, mut doomed) = read_segments(&*storage, to_read, &identity, listed, plan, &mut report)?;
    if index.as_ref().is_some_and(|index| !index.fits(&read)) {
        return recover(storage, &Plan { index: false, ..plan.clone() });
    }
    found.extend(read);
    found.sort_by_key(|segment| segment.number);
    for damage in damage_of_list(&*storage, &list, &found, segment_len) {
        match plan.mode {
            RecoveryMode::Strict => return Err(Error::corrupt(&damage.path, 0, damage.reason)),
            RecoveryMode::Salvage => report.lost.push(damage),
        }
    }
    // Nothing is written at the end of time, at which also what is kept for ever would be over.
    let newest_ms = found.iter().map(|segment| segment.scan.newest_ms).max().unwrap_or(0).min(u64::MAX - 1);
    check_clock(plan, newest_ms, &mut report)?;

    check_fences(&*storage, &found)?;
    let targets = found.iter().flat_map(|segment| segment.scan.targets.iter().copied()).collect::<Vec<_>>();
    let mut repairs = Vec::new();
    for segment in &found {
        repairs.push(classify(&*storage, segment, &targets, plan.mode, &mut report)?);
    }
    let now_ms = plan.now_ms.max(newest_ms);
    let (reservations, answers) = found.iter().fold((0, 0), |(reservations, answers), Found { scan, .. }| {
        (reservations + scan.reservations, answers + scan.answers)
    });
    // Most keys have left an answer, or a reservation.
    let keys = reservations.max(answers) + index.as_ref().map_or(0, |index| index.most_keys);
    // Numbers of keys differ from shard to shard, by chance by about their root.
    let keys = keys as usize / plan.shards;
    let capacity = capacity_for(keys + 2 * keys.isqrt());
    let arena = Arc::new(Arena::with_room_for::<Slot>(capacity));
    let shards = Shards::new(plan.shards, || Shard::with_capacity(capacity, &arena, now_ms));
    let live = match index.as_ref().map(|index| index.load(&found, &shards, plan.threads)) {
        Some(None) => return recover(storage, &Plan { index: false, ..plan.clone() }),
        Some(Some(live)) => live,
        None => Vec::new(),
    };
    // From here on everything that was found is accepted, and writing may begin.
    for name in names.iter().filter(|name| is_unborn(name)) {
        storage.remove(name)?;
    }
    // The highest number stays taken: it may have been given to a fence of which a power cut left nothing.
    // In salvage the segments that the newest fences are from may be lost.
    let given_out = found.iter().map(|segment| segment.number.max(segment.scan.newest_fence / segment_len));
    let upto = given_out.max().unwrap_or(0).max(listed.map_or(0, |listed| listed.upto));
    let upto = match planted!(NumbersReused) {
        true => found.iter().rfind(|segment| !segment.scan.is_blank()).map_or(0, |segment| segment.number),
        false => upto,
    };
    let blank = found.iter().rfind(|segment| segment.is_spare()).map(|segment| segment.number);
    let (blanks, mut kept): (Vec<_>, Vec<_>) =
        found.into_iter().zip(repairs).partition(|(segment, _)| segment.scan.is_blank());
    doomed.extend(blanks.iter().map(|(segment, _)| segment.number).filter(|number| Some(*number) != blank));
    let wanted = Listed { upto, numbers: kept.iter().map(|(segment, _)| segment.number).collect() };
    let mut list = if plan.persistent { Some(enlist(&storage, &identity, list, wanted)?) } else { None };
    if let Some(list) = list.as_mut().filter(|_| index.is_none()) {
        // Before anything changes that it says.
        if list.index().is_some() {
            list.drop_index(&Poison::default())?;
        }
        if names.iter().any(|name| name == INDEX_NAME) {
            // It is of no use to anybody any more, and does no harm.
            storage.remove(INDEX_NAME).ok();
        }
    }
    for number in &doomed {
        storage.remove(&segment_name(*number))?;
    }
    // A file that is too short can't be written to where its records end.
    for (segment, _) in kept.iter_mut().filter(|(segment, _)| segment.has_to_be_rebuilt) {
        segment.blob = rebuild(&*storage, store_id, segment)?;
    }
    if kept.iter().any(|(_, repair)| !repair.scrubs.is_empty()) {
        // Or a power cut could leave a record half overwritten, and not the note of that: the note's own sync may have failed.
        for (segment, _) in kept.iter().filter(|(segment, _)| !segment.scan.targets.is_empty()) {
            let written = segment.unsynced().map_or(Ok(()), |unsynced| rewrite(&*segment.blob, unsynced));
            let path = storage.path(&segment_name(segment.number));
            written
                .and_then(|()| segment.blob.sync())
                .map_err(|source| Error::io("repair a segment", &path, source))?;
        }
    }
    let (mut segments, mut endings) = (Vec::new(), Vec::new());
    for (segment, repair) in kept {
        let (segment, ending) = mend(&storage, segment, repair, &mut report)?;
        endings.extend(ending.map(|ending| (Arc::clone(&segment), ending)));
        segments.push(segment);
    }
    storage.sync_names()?;
    report.segments = segments.len() as u64 + blank.map_or(0, |_| 1);
    let newest_reservations = segments.iter().filter(|segment| segment.has_reservations()).map(|s| s.number()).max();
    for segment in &segments {
        segment.set_masks(newest_reservations.unwrap_or(0));
    }
    let options = Options { store_id, segment_len, max_bytes: plan.max_bytes, persistent: plan.persistent };
    let mut journal = Journal::new(storage, options, list, &segments, blank, upto + 1, newest_ms)?;
    for Live { number, records, most_bytes } in &live {
        if let Ok(at) = segments.binary_search_by_key(number, |segment| segment.number()) {
            segments[at].set_indexed(*records, *most_bytes);
            report.indexed += records;
        }
    }
    // Reservations first: an answer finds the one that it was given for by its fence.
    let to_replay = segments.iter().filter(|segment| segment.is_checked());
    let (reservations, answers): (Vec<_>, Vec<_>) = to_replay.partition(|segment| segment.has_reservations());
    let hasher = index.as_ref().map_or(&plan.hasher, |index| &index.hasher).clone();
    let replay = Replay { journal: &journal, shards: &shards, hasher: &hasher, now_ms };
    // Of a key's reservations and releases in order, by whoever has its shard.
    let replay = || {
        let mut shares = in_shares(plan.threads.min(reservations.len()), |share| replay.run(&reservations, share));
        shares
            .extend(in_shares(plan.threads.min(answers.len()), |share| replay.run(&share.part(&answers), Share::ALL)));
        shares.into_iter().collect::<Result<Vec<_>>>()
    };
    // One waits for the disk most of the time.
    let end_all = || endings.iter().try_for_each(|(segment, ending)| ending.seal(&journal, segment));
    let (ended, strays) = side_by_side(plan.threads > 1, end_all, replay);
    ended?;
    let mut strays = strays?.concat();
    journal.count_again();
    strays.sort_unstable();
    let keys = finish(&journal, &shards, &mut report)?;
    report.elapsed = started.elapsed();
    let spared = live.iter().map(|live| live.number).collect();
    Ok(Recovery { journal, hasher, shards, arena, report, newest_ms, keys, strays, spared })
}

fn is_unborn(name: &str) -> bool {
    name.strip_suffix(".new").is_some_and(|stem| {
        [STORE_NAME, LIST_NAME, INDEX_NAME].contains(&stem)
            || segment_number(stem).is_some()
            || matches!(stem, "probe-a" | "probe-b")
    })
}

/// Which store this is.
struct Identity {
    store_id: [u8; 16],
    segment_len: u64,
    /// Whether the file that says so is still to be written.
    is_unwritten: bool,
    /// Whether it has a list of its segments.
    is_listed: bool,
}

/// Reads which store this is; makes it up for a new one, and in salvage takes it from the segments if need be.
fn identify(storage: &dyn Storage, names: &[String], plan: &Plan, report: &mut RecoveryReport) -> Result<Identity> {
    let path = storage.path(STORE_NAME);
    let segment = names.iter().find(|name| segment_number(name).is_some());
    let found = match storage.read_small(STORE_NAME, 4096)? {
        Some(bytes) => match SegmentHeader::decode(&bytes) {
            Ok(header) if !crate::builder::is_segment_len(header.len) || header.number != 0 || header.is_void => {
                Err("the store's header makes no sense".to_owned())
            }
            Ok(SegmentHeader { store_id, len, is_listed, .. }) => {
                Ok(Identity { store_id, segment_len: len, is_unwritten: false, is_listed })
            }
            Err(BadHeader::Newer { major, features }) => return Err(newer(storage, STORE_NAME, major, features)),
            Err(BadHeader::Damaged) => Err("the store's header is damaged".to_owned()),
        },
        None => match segment {
            Some(name) => Err(format!("the file is missing, but there is a segment {name}")),
            None => Ok(new_identity(plan, &path)?),
        },
    };
    let identity = match (found, plan.mode) {
        (Ok(identity), _) => identity,
        (Err(reason), RecoveryMode::Strict) => return Err(Error::corrupt(&path, 0, reason)),
        (Err(reason), RecoveryMode::Salvage) => {
            let identity = match (identity_of_segments(storage, names)?, segment) {
                (Some(identity), _) => identity,
                (None, None) => new_identity(plan, &path)?,
                (None, Some(_)) => {
                    return Err(Error::corrupt(&path, 0, format!("{reason}, and no segment's header can be read")));
                }
            };
            report.lost.push(Damage { path, offset: 0, len: STORE_LEN, reason });
            identity
        }
    };
    let placed = |error: Error| if identity.is_unwritten { error } else { error.at(&storage.path(STORE_NAME), None) };
    let len = identity.segment_len;
    if plan.segment_len_is_set && len != plan.segment_len {
        let message = format!("the store was made with segments of {len} bytes, not {}", plan.segment_len);
        return Err(placed(Error::new(ErrorKind::InvalidArgument, message)));
    }
    check_max_bytes(plan.max_bytes, len).map_err(placed)?;
    Ok(identity)
}

/// Whether so many bytes are enough for a store with segments of this length.
pub(crate) fn check_max_bytes(max_bytes: Option<u64>, segment_len: u64) -> Result<()> {
    match max_bytes {
        Some(max_bytes) if max_bytes / LEAST_SEGMENTS < segment_len => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "max_bytes = {max_bytes} is less than {LEAST_SEGMENTS} segments of {segment_len}; allow more, or choose a smaller \
                 segment_size for a new store"
            ),
        )),
        Some(_) | None => Ok(()),
    }
}

fn new_identity(plan: &Plan, path: &Path) -> Result<Identity> {
    let mut store_id = plan.new_store_id.unwrap_or_default();
    if plan.new_store_id.is_none() {
        getrandom::fill(&mut store_id)
            .map_err(|error| Error::io("draw a store id for", path, std::io::Error::other(error)))?;
    }
    Ok(Identity { store_id, segment_len: plan.segment_len, is_unwritten: true, is_listed: false })
}

/// What most headers of segments say, if any can be read.
fn identity_of_segments(storage: &dyn Storage, names: &[String]) -> Result<Option<Identity>> {
    let mut votes = BTreeMap::<_, u64>::new();
    for name in names {
        let Some(number) = segment_number(name) else { continue };
        let bytes = storage.read_small(name, STORE_LEN as usize)?.unwrap_or_default();
        if let Ok(header) = SegmentHeader::decode(&bytes)
            && header.number == number
            && crate::builder::is_segment_len(header.len)
        {
            *votes.entry((header.store_id, header.len)).or_default() += 1;
        }
    }
    let most = votes.into_iter().max_by_key(|(_, count)| *count);
    let is_listed = names.iter().any(|name| name == LIST_NAME);
    Ok(most.map(|((store_id, segment_len), _)| Identity { store_id, segment_len, is_unwritten: true, is_listed }))
}

fn newer(storage: &dyn Storage, name: &str, major: u16, features: u32) -> Error {
    let message = format!(
        "written in format version {major} with features {features:#x}, which this build doesn't read; \
         nothing was changed"
    );
    Error::new(ErrorKind::UnsupportedVersion, message).at(&storage.path(name), Some(0))
}

/// What is wrong with the list, or with the segments by it: cases L and O.
fn damage_of_list(
    storage: &dyn Storage,
    list: &Option<Result<SegmentList, String>>,
    found: &[Found],
    segment_len: u64,
) -> Vec<Damage> {
    match list {
        None => Vec::new(),
        Some(Err(reason)) => {
            vec![Damage { path: storage.path(LIST_NAME), offset: 0, len: LIST_LEN, reason: reason.clone() }]
        }
        Some(Ok(list)) => {
            let is_there = |number: &u64| found.binary_search_by_key(number, |segment| segment.number).is_ok();
            let missing = list.listed().numbers.iter().filter(|number| !is_there(number));
            let damage = |number: &u64| Damage {
                path: storage.path(&segment_name(*number)),
                offset: 0,
                len: segment_len,
                reason: MISSING.to_owned(),
            };
            missing.map(damage).collect()
        }
    }
}

/// Makes the list say what is kept, and the store's own file that there is a list.
///
/// Nothing that the list had may be removed before. Of what it gets new all names are durable, and so is the list
/// before the store is said to have one.
fn enlist(
    storage: &Arc<dyn Storage>,
    identity: &Identity,
    list: Option<Result<SegmentList, String>>,
    wanted: Listed,
) -> Result<SegmentList> {
    let Identity { store_id, segment_len, .. } = *identity;
    let list = match list {
        Some(Ok(mut list)) => {
            list.settle()?;
            if *list.listed() != wanted {
                storage.sync_names()?;
                list.put(wanted, &Poison::default())?;
            }
            list
        }
        Some(Err(_)) | None => {
            storage.sync_names()?;
            SegmentList::create(storage, store_id, segment_len, wanted)?
        }
    };
    if identity.is_unwritten || !identity.is_listed {
        let header = SegmentHeader { is_listed: true, ..SegmentHeader::new(store_id, 0, segment_len) };
        storage.write_small(STORE_NAME, &header.encode())?;
    }
    Ok(list)
}

/// Reads the segments' files, and says which numbers are to be removed whatever stands in them: case M.
fn read_segments(
    storage: &dyn Storage,
    numbers: Vec<u64>,
    identity: &Identity,
    listed: Option<&Listed>,
    plan: &Plan,
    report: &mut RecoveryReport,
) -> Result<(Vec<Found>, Vec<u64>)> {
    let (mut found, mut doomed) = (Vec::new(), Vec::new());
    let whole = Mutex::new(Vec::new());
    let shares = in_shares(plan.threads.min(numbers.len()), |share| {
        let mut piece = Vec::new();
        let numbers = share.part(&numbers).into_iter();
        numbers.map(|number| read_segment(storage, identity, number, &mut piece, &whole)).collect::<Vec<_>>()
    });
    let mut shares: Vec<_> = shares.into_iter().map(Vec::into_iter).collect();
    for (at, number) in numbers.into_iter().enumerate() {
        let of = shares.len();
        let (segment, mut damages) = shares[at % of].next().expect("each number is in one share")?;
        let path = storage.path(&segment_name(number));
        match listed.map(|listed| listed.standing(number)) {
            Some(Standing::Unlisted) if !segment.is_spare() => {
                doomed.push(number);
                continue;
            }
            Some(Standing::Unborn) if !segment.scan.is_blank() && plan.mode == RecoveryMode::Strict => {
                damages.push(Damage {
                    path: path.clone(),
                    offset: 0,
                    len: segment.len,
                    reason: format!("the segment holds records, and {LIST_NAME} never had it"),
                });
            }
            Some(Standing::Listed | Standing::Unlisted | Standing::Unborn) | None => {}
        }
        match plan.mode {
            RecoveryMode::Salvage => report.lost.append(&mut damages),
            RecoveryMode::Strict => {
                if let Some(Damage { offset, reason, .. }) = damages.into_iter().next() {
                    return Err(Error::corrupt(&path, offset, reason));
                }
            }
        }
        report.records += segment.scan.records;
        found.push(segment);
    }
    Ok((found, doomed))
}

/// An index that stands for some of the segments.
struct Indexed {
    index: Index,
    hasher: KeyHasher,
    /// Keys that there is room for in the segments.
    most_keys: u64,
}

/// Records of a segment that slots point to.
#[derive(Clone, Copy)]
struct Live {
    number: u64,
    records: u64,
    most_bytes: u64,
}

impl Indexed {
    /// The index that the list names, with the segments that it stands for; `None` if there is none to rely on.
    fn open(
        storage: &dyn Storage,
        identity: &Identity,
        list: &SegmentList,
        plan: &Plan,
    ) -> Option<(Vec<Found>, Indexed)> {
        // What is to be salvaged has to be read.
        let digest = list.index().filter(|_| plan.index && plan.mode == RecoveryMode::Strict)?;
        let index = Index::open(storage, digest)?;
        let directory = &index.directory;
        let is_ours = (directory.store_id, directory.segment_len) == (identity.store_id, identity.segment_len);
        if !is_ours || directory.chunks.len() != plan.shards || directory.upto > list.listed().upto {
            return None;
        }
        let hasher = plan.hasher.like(directory.hash_keys, directory.hash_check)?;
        // Of those that are not listed any more all records were dead.
        let there = directory.segments.iter().filter(|covered| list.listed().numbers.contains(&covered.number));
        let room: u64 = there.clone().map(|covered| covered.live_bytes / SHORTEST_RECORD).sum();
        let found = there.map(|covered| find_covered(storage, identity, covered, directory.newest_ms));
        let found = found.collect::<Option<Vec<_>>>()?;
        let most_keys = directory.entries().min(room);
        Some((found, Indexed { index, hasher, most_keys }))
    }

    /// Whether the other segments reach as far as they did when it was written: older copies of them lack what it leaves to them.
    fn fits(&self, others: &[Found]) -> bool {
        let in_use: HashMap<u64, u64> = self.index.directory.in_use.iter().copied().collect();
        others.iter().all(|segment| in_use.get(&segment.number).is_none_or(|end| segment.scan.end >= *end))
    }

    /// Puts the entries that lead to the segments found into the table: of each segment how many. `None` if they are not as they
    /// were written.
    fn load(&self, found: &[Found], shards: &Shards<Shard>, threads: usize) -> Option<Vec<Live>> {
        let Directory { segment_len, chunks, segments, .. } = &self.index.directory;
        let is_there = |number| found.binary_search_by_key(&number, |segment| segment.number).is_ok();
        let places = segments.iter().zip(0_usize..).map(|(covered, at)| (covered.number, at));
        let places: HashMap<u64, usize, ahash::RandomState> = places.collect();
        let are_there: Vec<bool> = segments.iter().map(|covered| is_there(covered.number)).collect();
        let shares = in_shares(threads.min(chunks.len()), |share| {
            let mut records = vec![0; segments.len()];
            for nth in (share.nth..chunks.len()).step_by(share.of) {
                let mut shard = shards.get(nth);
                self.index.read_chunk(nth, |tag, raw| {
                    let word = Word::from_raw(raw);
                    let (number, offset) = (word.lsn() / segment_len, word.lsn() % segment_len);
                    let at = *places.get(&number)?;
                    let is_record = (SEGMENT_HEAD..segments[at].end).contains(&offset);
                    if !is_record || !matches!(word.phase(), Phase::Reserved | Phase::Completed) {
                        return None;
                    }
                    if are_there[at] {
                        records[at] += 1;
                        shard.insert(tag, word, u64::MAX);
                    }
                    Some(())
                })?;
            }
            Some(records)
        });
        let shares: Vec<Vec<u64>> = shares.into_iter().collect::<Option<_>>()?;
        let live = |(at, covered): (usize, &Covered)| {
            let records: u64 = shares.iter().map(|records| records[at]).sum();
            let is_possible = records * SHORTEST_RECORD <= covered.live_bytes;
            is_possible.then_some(Live { number: covered.number, records, most_bytes: covered.live_bytes })
        };
        segments.iter().enumerate().filter(|(at, _)| are_there[*at]).map(live).collect()
    }
}

/// A segment that an index stands for, by its head and its seal; `None` if they don't say what the index says.
fn find_covered(storage: &dyn Storage, identity: &Identity, covered: &Covered, newest_ms: u64) -> Option<Found> {
    let Identity { store_id, segment_len: len, .. } = *identity;
    let Covered { number, end, holds, .. } = *covered;
    let blob = storage.open(&segment_name(number)).ok()?;
    let binding = Binding::new(&store_id, number);
    let base = number << len.trailing_zeros();
    let mut head = vec![0; SEGMENT_HEAD as usize];
    let mut seal = [0; HEADER];
    blob.read_at(0, &mut head).and_then(|()| blob.read_at(end, &mut seal)).ok()?;
    let is_sealed = RecordRef::check_first(binding, &seal, end)
        .is_ok_and(|seal| seal.kind() == Kind::Seal && seal.fence() == base + end);
    let scan = Scan {
        end,
        is_sealed,
        has_reservations: holds == Holds::Reservations,
        // Else it would pass for one of notes.
        answers: u64::from(holds == Holds::Answers),
        newest_ms,
        ..Scan::of_head(&head, binding, base)
    };
    let is_whole = SegmentHeader::decode(&head).is_ok_and(|header| header == SegmentHeader::new(store_id, number, len))
        && blob.len() == len
        && !head_is_dirty(&head, binding)
        && (scan.is_sealed, scan.head_is_sealed, scan.durable) == (true, true, end);
    is_whole.then_some(Found { number, base, len, binding, blob, scan, has_to_be_rebuilt: false })
}

/// Reads one segment's file, and says what is wrong with its length and head. In `whole` one thread at a time reads what can't be
/// read in pieces.
fn read_segment(
    storage: &dyn Storage,
    identity: &Identity,
    number: u64,
    piece: &mut Vec<u8>,
    whole: &Mutex<Vec<u8>>,
) -> Result<(Found, Vec<Damage>)> {
    let Identity { store_id, segment_len, .. } = *identity;
    let name = &segment_name(number);
    let path = storage.path(name);
    if number == 0 || number >= numbers_end(segment_len) {
        return Err(Error::corrupt(&path, 0, "the segment's number is out of range"));
    }
    let blob = storage.open(name)?;
    let damage = |offset, len, reason: String| Damage { path: path.clone(), offset, len, reason };
    let mut damages = Vec::new();
    if blob.len() != segment_len {
        let (short, long) = (blob.len().min(segment_len), blob.len().max(segment_len));
        let reason = format!("the file is {} bytes long; segments of this store have {segment_len}", blob.len());
        damages.push(damage(short, long - short, reason));
    }
    let fail = |source| Error::io("read a segment", &path, source);
    read_start(&*blob, SEGMENT_HEAD, piece).map_err(fail)?;
    let binding = Binding::new(&store_id, number);
    let expected = SegmentHeader::new(store_id, number, segment_len);
    let mut is_void = false;
    match SegmentHeader::decode(piece) {
        Ok(header) if header == expected && !head_is_dirty(piece, binding) => {}
        Ok(header) if header.is_void && (header.store_id, header.len) == (store_id, segment_len) => is_void = true,
        Err(BadHeader::Newer { major, features }) => return Err(newer(storage, name, major, features)),
        Ok(header) if header == expected => {
            damages.push(damage(0, SEGMENT_HEAD, "the segment's head is damaged".to_owned()))
        }
        Ok(header) => {
            let store = if header.store_id == store_id { "this" } else { "another" };
            let message =
                format!("the file is segment {:016x} of {store} store; move it to where it belongs", header.number);
            return Err(Error::corrupt(&path, 0, message));
        }
        Err(BadHeader::Damaged) => damages.push(damage(0, SEGMENT_HEAD, "the segment's header is damaged".to_owned())),
    }
    let base = number << segment_len.trailing_zeros();
    let has_to_be_rebuilt = !damages.is_empty();
    let scan = if is_void {
        Scan::blank()
    } else {
        let found = if has_to_be_rebuilt {
            None
        } else {
            scan_in_pieces(&*blob, binding, base, piece, |_, _| {}).map_err(fail)?
        };
        match found {
            Some(scan) => scan,
            None => {
                let mut bytes = whole.lock();
                read_start(&*blob, segment_len, &mut bytes).map_err(fail)?;
                scan(&bytes, binding, base)
            }
        }
    };
    Ok((Found { number, base, len: segment_len, binding, blob, scan, has_to_be_rebuilt }, damages))
}

/// One of several parts of some work.
#[derive(Clone, Copy)]
struct Share {
    nth: usize,
    of: usize,
}

impl Share {
    const ALL: Share = Share { nth: 0, of: 1 };

    fn part<T: Copy>(self, all: &[T]) -> Vec<T> {
        all.iter().skip(self.nth).step_by(self.of).copied().collect()
    }
}

/// Does one thing in a thread of its own, if one is wanted and can be started, and the other here.
fn side_by_side<A: Send, B>(in_thread: bool, one: impl Fn() -> A + Sync, other: impl FnOnce() -> B) -> (A, B) {
    thread::scope(|scope| {
        let started = in_thread.then(|| thread::Builder::new().spawn_scoped(scope, &one)).and_then(Result::ok);
        match started {
            None => (one(), other()),
            Some(thread) => {
                let other = other();
                (thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), other)
            }
        }
    })
}

/// Does the shares of some work side by side, as far as threads can be started; at least one.
fn in_shares<T: Send>(count: usize, work: impl Fn(Share) -> T + Sync) -> Vec<T> {
    if count <= 1 {
        return vec![work(Share::ALL)];
    }
    let work = &work;
    thread::scope(|scope| {
        let start = |nth| {
            let share = Share { nth, of: count };
            thread::Builder::new().spawn_scoped(scope, move || work(share)).map_err(|_| share)
        };
        let started: Vec<_> = (1..count).map(start).collect();
        let mut done = vec![work(Share { nth: 0, of: count })];
        done.extend(started.into_iter().map(|share| match share {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(share) => work(share),
        }));
        done
    })
}

/// A segment's first bytes, with zeros for those that a file of the wrong length doesn't have.
fn read_start(blob: &dyn Blob, len: u64, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    bytes.resize(len as usize, 0);
    let there = blob.len().min(len) as usize;
    bytes[there..].fill(0);
    blob.read_at(0, &mut bytes[..there])
}

fn check_clock(plan: &Plan, newest_ms: u64, report: &mut RecoveryReport) -> Result<()> {
    if newest_ms == 0 {
        return Ok(());
    }
    report.clock_ahead = Duration::from_millis(plan.now_ms.saturating_sub(newest_ms));
    report.clock_behind = Duration::from_millis(newest_ms.saturating_sub(plan.now_ms));
    match plan.clock_jump_limit {
        Some(limit) if report.clock_ahead > limit => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "the clock is {:?} ahead of the newest record, more than clock_jump_limit = {limit:?}; \
                 if that is right, open with a higher limit",
                report.clock_ahead
            ),
        )),
        Some(_) | None => Ok(()),
    }
}

/// What has to be written to make a segment whole.
#[derive(Default)]
struct Repair {
    pads: Vec<Gap>,
    /// Bytes behind the last record to be zeroed.
    cut: Option<Gap>,
    scrubs: Vec<Target>,
}

/// Decides what every gap of a segment means: cases F to H, and J.
fn classify(
    storage: &dyn Storage,
    segment: &Found,
    targets: &[Target],
    mode: RecoveryMode,
    report: &mut RecoveryReport,
) -> Result<Repair> {
    let scan = &segment.scan;
    let path = || storage.path(&segment_name(segment.number));
    let mut repair = Repair::default();
    let here = targets.iter().filter(|target| is_inside(target, segment));
    let mut here: Vec<Target> = here.copied().collect();
    here.sort_by_key(|target| target.lsn);
    here.dedup();
    check_targets(storage, segment, &here)?;
    // Where records end, half overwritten ones included.
    let mut reach = scan.end;
    for gap in &scan.gaps {
        let is_tail = gap.start >= scan.end;
        let after_scrubs = behind_torn_scrubs(gap, is_tail, segment.base, &here);
        reach = reach.max(after_scrubs);
        if after_scrubs >= gap.end {
            continue;
        }
        let gap = &Gap { start: after_scrubs, ..*gap };
        let damage = |reason: &str| Damage {
            path: path(),
            offset: gap.start,
            len: gap.end - gap.start,
            reason: reason.to_owned(),
        };
        let is_behind_seal = scan.is_sealed && is_tail;
        // With its header gone nobody knows how far it was durable.
        let was_durable = gap.start < scan.durable || scan.is_sealed || segment.has_to_be_rebuilt;
        if was_durable && !is_behind_seal && !(planted!(DurableTailCut) && is_tail) {
            let reason = match (scan.is_sealed, gap.header_is_whole) {
                (_, true) => "the key or the payload of a record that was durable is damaged",
                (true, false) => "a sealed segment holds bytes that are no record",
                (false, false) => "bytes below the durable mark are no record",
            };
            if mode == RecoveryMode::Strict {
                return Err(Error::corrupt(&path(), gap.start, format!("{} bytes: {reason}", gap.end - gap.start)));
            }
            report.lost.push(damage(reason));
        } else {
            report.cut.push(damage("written but never acknowledged as durable"));
        }
        if is_tail {
            // There may be several: records whose headers are whole and whose payloads are not.
            let start = repair.cut.map_or(gap.start, |cut| cut.start);
            repair.cut = Some(Gap { start, ..*gap });
        } else if gap.end - gap.start >= HEADER as u64 {
            repair.pads.push(*gap);
        } else {
            return Err(Error::corrupt(
                &path(),
                gap.start,
                "two records are closer together than any two were written",
            ));
        }
    }
    if scan.durable > scan.end.max(scan.gaps.last().map_or(0, |gap| gap.end)) {
        let (offset, len) = (scan.end, scan.durable - scan.end);
        let reason = "the segment is durable further than its records go".to_owned();
        if mode == RecoveryMode::Strict {
            return Err(Error::corrupt(&path(), offset, reason));
        }
        report.lost.push(Damage { path: path(), offset, len, reason });
    }
    if !scan.is_sealed && scan.end + HEADER as u64 > segment.len {
        return Err(Error::corrupt(&path(), scan.end, "records stand where a segment's seal belongs"));
    }
    // What is padded, cut or lost is zeros anyway.
    here.retain(|target| {
        let (start, end) = (target.lsn - segment.base, target.lsn - segment.base + target.len);
        end <= reach && !repair.pads.iter().chain(&repair.cut).any(|gap| gap.start < end && start < gap.end)
    });
    repair.scrubs = here;
    Ok(repair)
}

/// Refuses fences that no store gives out, and above which none is left to give.
fn check_fences(storage: &dyn Storage, found: &[Found]) -> Result<()> {
    match found.iter().find(|segment| segment.scan.newest_fence / segment.len >= numbers_end(segment.len)) {
        Some(segment) => {
            let reason = format!("a record's fence, {}, is none that was given out", segment.scan.newest_fence);
            Err(Error::corrupt(&storage.path(&segment_name(segment.number)), 0, reason))
        }
        None => Ok(()),
    }
}

/// Refuses a note that would have anything but whole records overwritten; bytes that are none are overwritten as a gap.
fn check_targets(storage: &dyn Storage, segment: &Found, targets: &[Target]) -> Result<()> {
    let path = || storage.path(&segment_name(segment.number));
    for target in targets {
        let at = target.lsn - segment.base;
        let mut header = [0; HEADER];
        // What a file that is too short does not have counts as zeros.
        if at + HEADER as u64 <= segment.blob.len() {
            let read = segment.blob.read_at(at, &mut header);
            read.map_err(|source| Error::io("read a segment", &path(), source))?;
        }
        let is_record = match header_says(segment.binding, at, &header) {
            // The seal of a segment that was cut short there.
            Some((Kind::Seal, _)) => at == segment.scan.end,
            Some((kind, len)) => len == target.len && (kind == Kind::Scrubbed || kind.phase().is_some()),
            None => {
                let is_in = |gap: &Gap| gap.start <= at && at + target.len <= gap.end;
                header[0] == 0 || at >= segment.scan.end || segment.scan.gaps.iter().any(is_in)
            }
        };
        if !is_record {
            return Err(Error::corrupt(&path(), at, "a note of an erasure names what is no record"));
        }
    }
    Ok(())
}

fn is_inside(target: &Target, segment: &Found) -> bool {
    let Some(at) = target.lsn.checked_sub(segment.base) else { return false };
    let fits = target.len >= HEADER as u64 && target.len.is_multiple_of(8) && at.is_multiple_of(8);
    fits && at >= SEGMENT_HEAD && target.len <= segment.len && at <= segment.len - target.len
}

/// Where the half overwritten records end that a gap begins with.
fn behind_torn_scrubs(gap: &Gap, is_tail: bool, base: u64, targets: &[Target]) -> u64 {
    let mut at = gap.start;
    for target in targets.iter().filter(|target| target.lsn >= base + gap.start) {
        // A record's own zeros at the end of all records don't count as part of a gap.
        if target.lsn != base + at || (at + target.len > gap.end && !is_tail) {
            break;
        }
        at += target.len;
    }
    at
}

/// What is left to make a segment durable and sealed.
struct Ending {
    end: u64,
    /// Where that begins which isn't known to be durable, if the segment wasn't sealed.
    unsynced: Option<Range<u64>>,
    /// Whether anything was written since it was found.
    is_dirty: bool,
    /// Whether the head has to be written.
    is_head_due: bool,
}

/// Writes what `classify` decided, and hands the segment over; it takes no more records, and is sealed by what is left to do.
fn mend(
    storage: &Arc<dyn Storage>,
    segment: Found,
    repair: Repair,
    report: &mut RecoveryReport,
) -> Result<(Arc<Segment>, Option<Ending>)> {
    let unsynced = segment.unsynced();
    let Found { number, base, binding, blob, scan, .. } = segment;
    let path = storage.path(&segment_name(number));
    let fail = |source| Error::io("repair a segment", &path, source);
    let mut end = scan.end;
    let mut is_dirty = !scan.is_sealed || !repair.pads.is_empty();
    for gap in &repair.pads {
        let pad = encode_blank(binding, gap.start, Kind::Pad, gap.end - gap.start);
        blob.overwrite(gap.start, &pad).map_err(fail)?;
        end = end.max(gap.end);
    }
    if let Some(gap) = &repair.cut {
        blob.overwrite(gap.start, &vec![0; (gap.end - gap.start) as usize]).map_err(fail)?;
        is_dirty = true;
    }
    for target in &repair.scrubs {
        let at = target.lsn - base;
        let scrubbed = encode_blank(binding, at, Kind::Scrubbed, target.len);
        let mut there = vec![0; scrubbed.len()];
        blob.read_at(at, &mut there).map_err(fail)?;
        if there[0] == 0 && !scan.gaps.iter().any(|gap| gap.start <= at && at < gap.end) {
            // No kind is zero: what was there was damaged once, and padded or cut. In a gap it is a hole still to be filled.
            continue;
        }
        // Also if it looks done: an earlier sync may have failed, and left it in the page cache only.
        blob.overwrite(at, &scrubbed).map_err(fail)?;
        report.scrubbed += u64::from(there != scrubbed);
        is_dirty = true;
        // A torn one at the very end did not count as readable; it is whole now.
        end = end.max(at + target.len);
    }
    // A head that says more than was left to salvage would have the segment refused for ever after.
    let is_head_due = !scan.is_sealed || !scan.head_is_sealed && !planted!(HeadSealNotRepeated) || scan.durable > end;
    let ending = (is_dirty || is_head_due).then_some(Ending { end, unsynced, is_dirty, is_head_due });
    let sealed = Segment::sealed(number, base, binding, Arc::clone(storage), blob, end)
        .map_err(|source| Error::io("map", &path, source))?;
    if scan.has_reservations {
        sealed.set_stream(Stream::RESERVATIONS);
    } else if scan.answers == 0 {
        sealed.set_stream(Stream::NOTES);
    }
    Ok((Arc::new(sealed), ending))
}

impl Ending {
    fn seal(&self, journal: &Journal, segment: &Segment) -> Result<()> {
        self.write(segment).map_err(|source| Error::io("repair a segment", &journal.path_of(segment.base()), source))
    }

    fn write(&self, segment: &Segment) -> std::io::Result<()> {
        let blob = segment.blob();
        if let Some(unsynced) = self.unsynced.clone().filter(|_| !planted!(UnsyncedAccepted)) {
            rewrite(blob, unsynced)?;
        }
        if self.is_dirty && !planted!(SealedBeforeSync) {
            // All that is accepted has to be durable before a seal says so.
            blob.sync()?;
        }
        let mark = |offset| encode_mark(segment.binding(), offset, Kind::Seal, segment.base() + self.end);
        if self.unsynced.is_some() {
            blob.overwrite(self.end, &mark(self.end))?;
        }
        if self.is_head_due {
            let mut head = mark(HEAD_MARK);
            // One of the first builds may say more than is left to salvage.
            head.resize(OLD_HEAD_MARK as usize + HEADER - HEAD_MARK as usize, 0);
            blob.overwrite(HEAD_MARK, &head)?;
            blob.sync()?;
        }
        if self.unsynced.is_some() {
            segment.give_rest_back()?;
        }
        Ok(())
    }
}

/// Writes what isn't known to be durable once more, as it is.
///
/// A sync that failed before this process, or before the machine's page cache was asked again, may have left pages that are
/// marked clean and were never written. The next sync would pass over them, and the seal would vouch for them.
fn rewrite(blob: &dyn Blob, unsynced: Range<u64>) -> std::io::Result<()> {
    let mut bytes = vec![0; (unsynced.end - unsynced.start) as usize];
    blob.read_at(unsynced.start, &mut bytes)?;
    blob.overwrite(unsynced.start, &bytes)
}

/// Replaces a file whose length or header is wrong by one with the same records.
fn rebuild(storage: &dyn Storage, store_id: [u8; 16], segment: &Found) -> Result<Arc<dyn Blob>> {
    let name = segment_name(segment.number);
    let len = segment.len;
    let mut bytes = Vec::new();
    read_start(&*segment.blob, len, &mut bytes)
        .map_err(|source| Error::io("read a segment", &storage.path(&name), source))?;
    bytes[..SEGMENT_HEAD as usize].fill(0);
    let header = SegmentHeader::new(store_id, segment.number, len).encode();
    bytes[..header.len()].copy_from_slice(&header);
    storage.write_small(&name, &bytes)?;
    storage.open(&name)
}

/// Puts the keys of the segments' records into the table: of each key's records the one that counts.
struct Replay<'r> {
    journal: &'r Journal,
    shards: &'r Shards<Shard>,
    hasher: &'r KeyHasher,
    now_ms: u64,
}

/// A record of a key, and what is known of the key.
struct Told<'s> {
    lsn: u64,
    record: RecordRef<'s>,
    key: Key<'s>,
    phase: Phase,
    hash: u64,
}

/// Records whose slots are fetched at the same time.
const TOGETHER: usize = 32;
/// In place of a timer, while the table is put together: the answer's retention is over.
const OVER: u32 = 0;

impl Replay<'_> {
    /// Replays the records of the keys in a share of the shards; returns those that are beaten and have to be overwritten.
    fn run(&self, segments: &[&Arc<Segment>], share: Share) -> Result<Vec<Target>> {
        let mut strays = Vec::new();
        for segment in segments {
            let mut read_to = segment.first_lsn();
            let mut told = Vec::with_capacity(TOGETHER);
            for (lsn, record) in segment.records_before_end() {
                read_to = lsn + record.len();
                let Some(phase) = record.kind().phase() else { continue };
                if planted!(ReleaseForgotten) && phase == Phase::Released {
                    continue;
                }
                let Some(key) = Key::parse(record.stored_key()) else { continue };
                let hash = self.hasher.hash(&key);
                if self.shards.index(hash) % share.of != share.nth {
                    continue;
                }
                if let Some(start) = self.shards.of(hash).table.start_of(tag_of(hash)) {
                    prefetch(start);
                }
                told.push(Told { lsn, record, key, phase, hash });
                if told.len() == TOGETHER {
                    self.take_in(segment, &mut told, &mut strays)?;
                }
            }
            self.take_in(segment, &mut told, &mut strays)?;
            if Some(read_to - segment.base()) != segment.end() {
                let offset = read_to - segment.base();
                let path = self.journal.path_of(segment.base());
                return Err(Error::corrupt(&path, offset, "the segment's records stop short of its end"));
            }
        }
        Ok(strays)
    }

    fn take_in(&self, segment: &Segment, told: &mut Vec<Told<'_>>, strays: &mut Vec<Target>) -> Result<()> {
        let map = self.journal.segments();
        for Told { lsn, record, key, phase, hash } in told.drain(..) {
            let tag = tag_of(hash);
            let word = Word::new(phase, lsn);
            let mut shard = self.shards.of(hash);
            for (_, slot) in shard.table.tagged(tag) {
                self.look_at(&map, slot.word())?;
            }
            // The reservation that the record is about is known by its fence where it was first written: no need to read it.
            let fence = Some(record.fence()).filter(|fence| *fence != lsn && *fence > 0 && fence.is_multiple_of(8));
            let reserved = fence.and_then(|fence| shard.find_word(tag, Word::new(Phase::Reserved, fence)));
            let (at, known) = match reserved {
                Some(at) => (at, None),
                None => match shard.find_key(self.journal, &map, tag, &key)? {
                    Sought::Found(at, known) => (at, Some(known)),
                    Sought::Absent => {
                        let at = shard.insert(tag, word, u64::MAX);
                        self.settle(&mut shard, at, segment, &record);
                        continue;
                    }
                    Sought::Unsettled(_) => unreachable!("what is published whole was looked at"),
                },
            };
            let slot = shard.table.slot(at).word();
            let (fence, known_sequence) = known.map_or((record.fence(), 0), |known| (known.fence(), known.sequence()));
            let state = State { phase: slot.phase(), fence, deadline_ms: u64::MAX };
            let seen = Recovered { phase, fence: record.fence(), sequence: record.sequence(), known_sequence };
            // Of a key whose erasure was cut short before any note of it, and that was used anew meanwhile. What beats the
            // answer, a release or another answer, may be over and gone long before it.
            let is_stray = |phase, record: &RecordRef<'_>, newer: u64| {
                !planted!(StrayKept)
                    && phase == Phase::Completed
                    && record.fence() < newer
                    && record.deadline_ms() > self.now_ms
            };
            match state::step(state, Event::Recover(seen)) {
                Transition::To(_) => {
                    if let Some(known) = known.filter(|known| is_stray(state.phase, known, record.fence())) {
                        strays.push(Target { lsn: slot.lsn(), len: known.len() });
                    }
                    let is_counted = match state.phase {
                        Phase::Completed => shard.table.slot(at).timer != OVER,
                        // Those of the index are.
                        Phase::Vacant | Phase::Reserved | Phase::Completing | Phase::Interrupted | Phase::Released => {
                            !self.journal.segment(&map, slot.lsn())?.is_checked()
                        }
                    };
                    if is_counted {
                        let len = self.journal.entry(&map, slot.lsn())?.len();
                        self.journal.sub_live_bytes(&map, slot.lsn(), len);
                    }
                    shard.table.slot_mut(at).timer = TimerId::NONE.raw();
                    shard.advance(at, tag, word, u64::MAX);
                    self.settle(&mut shard, at, segment, &record);
                }
                Transition::Stay if is_stray(phase, &record, state.fence) => {
                    strays.push(Target { lsn, len: record.len() });
                }
                // Upkeep was copying the reservation while it was released, and died before it took the copy back.
                Transition::Stay if state.phase == Phase::Released && phase == Phase::Reserved => {
                    strays.push(Target { lsn, len: record.len() });
                }
                Transition::Stay
                | Transition::Replay
                | Transition::InFlight
                | Transition::Mismatch
                | Transition::Fenced => {}
            }
        }
        Ok(())
    }

    /// Checks what a slot of the index leads to, if that was not done.
    fn look_at(&self, map: &SegmentMap, word: Word) -> Result<()> {
        let segment = self.journal.segment(map, word.lsn())?;
        match segment.has_to_be_looked_at(self.journal.offset_of(word.lsn())) {
            true => self.journal.settle(word.lsn()),
            false => Ok(()),
        }
    }

    /// Of an answer that a slot was just made to point to: whether it is over, until when it is kept, and that it lives.
    fn settle(&self, shard: &mut Shard, at: usize, segment: &Segment, record: &RecordRef<'_>) {
        let slot = shard.table.slot_mut(at);
        if slot.word().phase() != Phase::Completed {
            return;
        }
        let deadline_ms = record.deadline_ms();
        if state::is_over(deadline_ms, self.now_ms) {
            slot.timer = OVER;
        } else {
            segment.add_live(record.len());
            segment.note_deadline(slot.word().lsn() - segment.base(), deadline_ms);
        }
    }
}

/// Settles every key: what was released or is over goes, what had no verdict is interrupted. Returns how many are left.
fn finish(journal: &Journal, shards: &Shards<Shard>, report: &mut RecoveryReport) -> Result<u64> {
    let map = journal.segments();
    let mut keys = 0;
    for mut shard in shards.iter() {
        let is_settled = |slot: &Slot| slot.word().phase() == Phase::Completed && slot.timer != OVER;
        let rest = shard.table.iter().filter(|(_, slot)| !is_settled(slot));
        let rest: Vec<(u32, Word)> = rest.map(|(tag, slot)| (tag, slot.word())).collect();
        report.completed += (shard.table.len() - rest.len()) as u64;
        for (tag, word) in rest {
            let at = shard.find_word(tag, word).expect("nobody else has the table yet");
            // The process that held it is gone, or it is over already.
            let state = State { phase: word.phase(), fence: 0, deadline_ms: 0 };
            match state::step(state, Event::Elapse(u64::MAX)) {
                Transition::To(Phase::Vacant) => {
                    report.expired += u64::from(word.phase() == Phase::Completed);
                    shard.table.remove(at);
                }
                Transition::To(phase) => {
                    report.interrupted += 1;
                    shard.advance(at, tag, word.with(phase), u64::MAX);
                    let segment = journal.segment(&map, word.lsn())?;
                    // Those of the index are counted.
                    if segment.is_checked() {
                        segment.add_live(journal.entry(&map, word.lsn())?.len());
                    }
                }
                Transition::Stay
                | Transition::Replay
                | Transition::InFlight
                | Transition::Mismatch
                | Transition::Fenced => unreachable!("what has ended does not stay {:?}", word.phase()),
            }
        }
        shard.table.fit();
        keys += shard.table.len() as u64;
    }
    Ok(keys)
}

/// Reads all published records back from storage; nobody removes or overwrites any meanwhile.
pub(crate) fn verify(journal: &Journal) -> Result<u64> {
    // No mark is being rewritten while it is read.
    let _sealing = journal.sealing();
    journal.verify_list()?;
    let mut records = 0;
    let mut bytes = Vec::new();
    for segment in journal.segments().iter() {
        let path = journal.path_of(segment.base());
        let published = segment.published();
        bytes.resize(published as usize, 0);
        segment.blob().read_at(0, &mut bytes).map_err(|source| Error::io("read a segment", &path, source))?;
        if SegmentHeader::decode(&bytes).is_err() || head_is_dirty(&bytes, segment.binding()) {
            return Err(Error::corrupt(&path, 0, "the segment's header is damaged"));
        }
        let scan = scan(&bytes, segment.binding(), segment.base());
        if let Some(gap) = scan.gaps.first() {
            let message = format!("{} bytes are no record", gap.end - gap.start);
            return Err(Error::corrupt(&path, gap.start, message));
        }
        let seal_len = if scan.is_sealed { HEADER as u64 } else { 0 };
        if scan.end + seal_len != published {
            let message = format!("records end here and not at offset {published}");
            return Err(Error::corrupt(&path, scan.end, message));
        }
        records += scan.records;
    }
    Ok(records)
}

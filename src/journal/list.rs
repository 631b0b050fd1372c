//! Which segments there are, so that a missing one is noticed.
//!
//! The file `SEGMENTS` has two slots of equal length. Each holds one record of kind [`Kind::List`], bound to the store and to its
//! place: the fence is the list's sequence number, the payload the highest number ever listed and then the listed
//! numbers in order, 8 bytes each; in the place of the attempt stands the slot's length in units of 4 KiB, and in that of the
//! fingerprint which index counts, if any. The list of the highest sequence number that is whole counts.
//!
//! - **L1** A segment is listed, durably, before its first record is written, and unlisted, durably, before its file is
//!   removed or given another number.
//! - **L2** List `n` is written to slot `n mod 2`: never over the one that was synced last. Only when it is synced is the other
//!   slot made a copy of it, so that damage at rest to one slot does no harm, and a list that stands in both is durable.
//! - **L3** An index that the list names is durable, and so are all records that it leaves to the journal. Builds that know no
//!   index name none in the lists that they write, and they write one before anything else.
//! - **L4** After a failed sync no list is written any more (`poison`).
//!
//! So a listed segment without a file is a loss. A file that isn't listed was being made or renewed if it is blank; if it
//! is not, its removal was decided, unless its number is above all that were ever listed.

use super::codec::{Binding, HEADER, Kind, Meta, RecordRef, encode};
use super::commit::Poison;
use super::media::{Blob, Storage};
use super::{numbers_end, segment_name};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Fingerprint;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The file's name.
pub(crate) const LIST_NAME: &str = "SEGMENTS";
/// What is wrong with a segment that is listed and has no file.
pub(crate) const MISSING: &str = "the segment's file is missing";
const SHORTEST_SLOT: u64 = 4096;
/// Room for a million segments.
const LONGEST_SLOT: u64 = 8 << 20;

/// A slot's length as its record says it: a file of another length was cut or stretched.
fn slot_pages(slot_len: u64) -> u32 {
    (slot_len / SHORTEST_SLOT) as u32
}

/// What a list says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The highest number ever listed.
    pub(crate) upto: u64,
    pub(crate) numbers: BTreeSet<u64>,
}

/// What a list says of a segment's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Listed,
    /// It may have been listed once: if it holds anything, it was to be removed.
    Unlisted,
    /// Its number is higher than any that was ever listed, so it never had a record.
    Unborn,
}

impl Listed {
    pub(crate) fn standing(&self, number: u64) -> Standing {
        if self.numbers.contains(&number) {
            Standing::Listed
        } else if number <= self.upto {
            Standing::Unlisted
        } else {
            Standing::Unborn
        }
    }

    fn encode(&self) -> Vec<u8> {
        std::iter::once(&self.upto).chain(&self.numbers).flat_map(|number| number.to_le_bytes()).collect()
    }

    fn decode(payload: &[u8], numbers_end: u64) -> Option<Listed> {
        let (words, []) = payload.as_chunks::<8>() else { return None };
        let (upto, listed) = words.split_first()?;
        let upto = u64::from_le_bytes(*upto);
        let listed: Vec<u64> = listed.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let are_in_order = listed.is_sorted_by(|one, next| one < next) && listed.first() != Some(&0);
        let are_in_range = upto < numbers_end && listed.last().is_none_or(|last| *last <= upto);
        (are_in_order && are_in_range).then(|| Listed { upto, numbers: listed.into_iter().collect() })
    }
}

/// The list, and the file that says so.
#[derive(Debug)]
pub(crate) struct SegmentList {
    storage: Arc<dyn Storage>,
    store_id: [u8; 16],
    segment_len: u64,
    /// None while it isn't certain which file bears the name: the next list is written anew.
    blob: Option<Arc<dyn Blob>>,
    slot_len: u64,
    sequence: u64,
    listed: Listed,
    /// Which index counts, if any; [`Fingerprint::NONE`] is none.
    index: Fingerprint,
    is_in_both_slots: bool,
}

impl SegmentList {
    /// Reads the list; the inner error says why there is none.
    pub(crate) fn read(
        storage: &Arc<dyn Storage>,
        store_id: [u8; 16],
        segment_len: u64,
    ) -> Result<Result<SegmentList, String>> {
        let limit = 2 * LONGEST_SLOT as usize + 1;
        let Some(bytes) = storage.read_small(LIST_NAME, limit)? else {
            return Ok(Err("the list of segments is missing".to_owned()));
        };
        let slot_len = bytes.len() as u64 / 2;
        let is_slot_len = slot_len.is_power_of_two() && (SHORTEST_SLOT..=LONGEST_SLOT).contains(&slot_len);
        if !is_slot_len || bytes.len() as u64 != 2 * slot_len {
            return Ok(Err(format!("the list of segments is {} bytes long, which none was made with", bytes.len())));
        }
        let binding = Binding::new(&store_id, 0);
        let read_slot = |slot: u64| {
            let record = RecordRef::check(binding, &bytes, slot * slot_len).ok()?;
            let is_list = record.kind() == Kind::List && record.len() <= slot_len && record.fence() < u64::MAX / 2;
            // The first builds did not say it.
            let is_list = is_list && (record.attempt() == 0 || record.attempt() == slot_pages(slot_len));
            let listed = Listed::decode(record.payload(), numbers_end(segment_len)).filter(|_| is_list)?;
            Some((record.fence(), listed, record.fingerprint()))
        };
        let slots = [read_slot(0), read_slot(1)];
        let is_in_both_slots = slots[0] == slots[1];
        let Some((sequence, listed, index)) = slots.into_iter().flatten().max_by_key(|(sequence, ..)| *sequence) else {
            return Ok(Err("the list of segments is damaged, or another store's".to_owned()));
        };
        let blob = Some(storage.open(LIST_NAME)?);
        let storage = Arc::clone(storage);
        Ok(Ok(SegmentList {
            storage,
            store_id,
            segment_len,
            blob,
            slot_len,
            sequence,
            listed,
            index,
            is_in_both_slots,
        }))
    }

    /// Writes the first list of a store, or one in place of what can't be read.
    pub(crate) fn create(
        storage: &Arc<dyn Storage>,
        store_id: [u8; 16],
        segment_len: u64,
        listed: Listed,
    ) -> Result<SegmentList> {
        let mut list = SegmentList {
            storage: Arc::clone(storage),
            store_id,
            segment_len,
            blob: None,
            slot_len: SHORTEST_SLOT,
            sequence: 0,
            listed: Listed::default(),
            index: Fingerprint::NONE,
            is_in_both_slots: false,
        };
        list.put(listed, &Poison::default())?;
        Ok(list)
    }

    pub(crate) fn listed(&self) -> &Listed {
        &self.listed
    }

    /// Which index counts, if any.
    pub(crate) fn index(&self) -> Option<Fingerprint> {
        Some(self.index).filter(|index| *index != Fingerprint::NONE)
    }

    /// Says which index counts from here on. If that fails this list or the one of before is there, and the next one says it again.
    pub(crate) fn set_index(&mut self, index: Fingerprint, poison: &Poison) -> Result<()> {
        poison.check()?;
        self.index = index;
        self.put(self.listed.clone(), poison)
    }

    /// Makes no index count from here on.
    pub(crate) fn drop_index(&mut self, poison: &Poison) -> Result<()> {
        let index = self.index;
        self.set_index(Fingerprint::NONE, poison).inspect_err(|_| self.index = index)
    }

    /// Makes sure that what was read is durable: a sync that failed may have left it in the page cache only.
    pub(crate) fn settle(&mut self) -> Result<()> {
        if self.is_in_both_slots {
            return Ok(());
        }
        self.write(self.sequence, self.listed.clone(), &Poison::default())
    }

    pub(crate) fn add(&mut self, number: u64, poison: &Poison) -> Result<()> {
        let mut listed = self.listed.clone();
        listed.upto = listed.upto.max(number);
        listed.numbers.insert(number);
        self.put(listed, poison)
    }

    /// Writes a list also if none of the numbers was in it: one that failed to be written may have them.
    pub(crate) fn remove(&mut self, numbers: &[u64], poison: &Poison) -> Result<()> {
        let mut listed = self.listed.clone();
        listed.numbers.retain(|number| !numbers.contains(number));
        self.put(listed, poison)
    }

    /// Writes the next list; it is durable on return.
    pub(crate) fn put(&mut self, listed: Listed, poison: &Poison) -> Result<()> {
        poison.check()?;
        self.write(self.sequence + 1, listed, poison)
    }

    fn write(&mut self, sequence: u64, listed: Listed, poison: &Poison) -> Result<()> {
        let payload = listed.encode();
        let fits = (HEADER + payload.len()) as u64 <= self.slot_len;
        match self.blob.clone().filter(|_| fits) {
            Some(blob) => self.write_slots(&*blob, sequence, &payload, poison)?,
            None => self.write_anew(sequence, &payload, poison)?,
        }
        self.sequence = sequence;
        self.listed = listed;
        self.is_in_both_slots = true;
        Ok(())
    }

    fn write_slots(&self, blob: &dyn Blob, sequence: u64, payload: &[u8], poison: &Poison) -> Result<()> {
        let fail = |source| Error::io("write the list of segments", &self.storage.path(LIST_NAME), source);
        let write = |slot: u64| blob.overwrite(slot * self.slot_len, &self.record(slot, sequence, payload));
        write(sequence % 2).map_err(fail)?;
        if planted!(ListCopiedBeforeSync) {
            write((sequence + 1) % 2).map_err(fail)?;
        }
        if !planted!(ListNotSynced) {
            blob.sync().inspect_err(|error| poison.set("sync the list of segments", error)).map_err(fail)?;
        }
        // Without it the list stands in one slot, as after a power cut.
        write((sequence + 1) % 2).ok();
        Ok(())
    }

    /// Replaces the file by one that is long enough.
    fn write_anew(&mut self, sequence: u64, payload: &[u8], poison: &Poison) -> Result<()> {
        let slot_len = ((HEADER + payload.len()) as u64).next_power_of_two().max(self.slot_len);
        if slot_len > LONGEST_SLOT {
            return Err(Error::new(ErrorKind::Full, "the store has more segments than its list can hold"));
        }
        self.blob = None;
        self.slot_len = slot_len;
        let mut bytes = vec![0; 2 * slot_len as usize];
        for (slot, half) in bytes.chunks_exact_mut(slot_len as usize).enumerate() {
            let record = self.record(slot as u64, sequence, payload);
            half[..record.len()].copy_from_slice(&record);
        }
        self.storage.write_small(LIST_NAME, &bytes).inspect_err(|error| {
            // A full disk is no failed sync; whether the file was replaced is settled by replacing it again.
            if !error.is_full() {
                poison.set("write the list of segments anew", &std::io::Error::other(error.to_string()));
            }
        })?;
        // The list is durable; if this fails, the next one is written anew.
        self.blob = self.storage.open(LIST_NAME).ok();
        Ok(())
    }

    fn record(&self, slot: u64, sequence: u64, payload: &[u8]) -> Vec<u8> {
        let (attempt, fingerprint) = (slot_pages(self.slot_len), self.index);
        let meta = Meta { attempt, fingerprint, ..Meta::bare(Kind::List, sequence, 0) };
        let binding = Binding::new(&self.store_id, 0);
        encode(binding, slot * self.slot_len, &meta, &[], payload, |parts| parts.concat())
    }

    /// Reads the list back, and looks whether each listed segment has its file.
    pub(crate) fn verify(&self) -> Result<()> {
        let corrupt = |reason: String| Error::corrupt(&self.storage.path(LIST_NAME), 0, reason);
        let found = SegmentList::read(&self.storage, self.store_id, self.segment_len)?.map_err(corrupt)?;
        if (found.sequence, &found.listed) != (self.sequence, &self.listed) {
            return Err(corrupt("the list of segments is not the one that was written last".to_owned()));
        }
        let names: BTreeSet<String> = self.storage.list()?.into_iter().collect();
        match self.listed.numbers.iter().map(|number| segment_name(*number)).find(|name| !names.contains(name)) {
            Some(name) => Err(Error::corrupt(&self.storage.path(&name), 0, MISSING)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::media::{DiskOp, SimDisk, SimStorage};
    use proptest::prelude::*;
    use std::io;

    const STORE: [u8; 16] = [3; 16];
    const LEN: u64 = 64 * 1024;

    fn storage(disk: &SimDisk) -> Arc<dyn Storage> {
        Arc::new(SimStorage::open(disk).unwrap())
    }

    fn listed(upto: u64, numbers: impl IntoIterator<Item = u64>) -> Listed {
        Listed { upto, numbers: numbers.into_iter().collect() }
    }

    fn create(disk: &SimDisk, numbers: std::ops::RangeInclusive<u64>) -> SegmentList {
        SegmentList::create(&storage(disk), STORE, LEN, listed(*numbers.end(), numbers)).unwrap()
    }

    fn read(disk: &SimDisk) -> Result<Listed, String> {
        SegmentList::read(&storage(disk), STORE, LEN).unwrap().map(|list| list.listed)
    }

    #[test]
    fn a_list_that_outgrows_its_file_gets_a_longer_one() {
        let disk = SimDisk::new();
        let mut list = create(&disk, 1..=1);
        for number in 2..=1_600 {
            list.add(number, &Poison::default()).unwrap();
        }
        list.remove(&[1, 700], &Poison::default()).unwrap();
        drop(list);
        let numbers = (2..=1_600).filter(|number| *number != 700);
        assert_eq!(read(&disk.after_power_cut(|| false)), Ok(listed(1_600, numbers)));
        assert_eq!(disk.files(), [(LIST_NAME.to_owned(), 2 * 16 * 1024)]);
    }

    /// 503 numbers fit the shortest slot, so that some of these lists take a longer file.
    #[test]
    fn a_change_that_is_cut_off_is_made_or_is_not() {
        let mut cut_off = 0;
        for most in [4, 502, 503] {
            for op in [DiskOp::Create, DiskOp::Overwrite, DiskOp::Sync, DiskOp::SyncNames] {
                for call in 0..2 {
                    let disk = SimDisk::new();
                    let mut list = create(&disk, 1..=most - 1);
                    // The copy of this one is not durable yet.
                    list.add(most, &Poison::default()).unwrap();
                    disk.fail(op, call, io::ErrorKind::Other);
                    let poison = Poison::default();
                    let is_added = list.add(most + 1, &poison).is_ok();
                    cut_off += u32::from(!is_added);
                    assert_eq!(poison.is_set(), !is_added && op != DiskOp::Overwrite, "{op:?}");
                    drop(list);
                    for seed in 0_u64..64 {
                        let mut at = 0;
                        let image = disk.after_power_cut(|| {
                            at += 1;
                            seed.rotate_right(at * 7) & 1 == 1
                        });
                        let found = read(&image).unwrap();
                        let (before, after) = (listed(most, 1..=most), listed(most + 1, 1..=most + 1));
                        assert!(found == after || !is_added && found == before, "{op:?} {call}: {found:?}");
                    }
                }
            }
        }
        assert_eq!(cut_off, 6);
    }

    #[test]
    fn a_list_that_could_not_be_written_for_lack_of_room_is_written_later() {
        let disk = SimDisk::new();
        let mut list = create(&disk, 1..=503);
        let poison = Poison::default();
        disk.set_capacity(Some(8192));
        assert!(list.add(504, &poison).unwrap_err().is_full());
        list.remove(&[2], &poison).unwrap_err();
        disk.set_capacity(None);
        list.remove(&[1], &poison).unwrap();
        drop(list);
        assert_eq!(read(&disk.after_power_cut(|| false)), Ok(listed(503, 2..=503)));
    }

    #[test]
    fn what_a_failed_sync_left_in_the_page_cache_is_made_durable() {
        let disk = SimDisk::new();
        let mut list = create(&disk, 1..=2);
        disk.fail(DiskOp::Sync, 0, io::ErrorKind::Other);
        list.add(3, &Poison::default()).unwrap_err();
        drop(list);
        let disk = disk.after_process_death();
        let mut list = SegmentList::read(&storage(&disk), STORE, LEN).unwrap().unwrap();
        assert_eq!(list.listed, listed(3, 1..=3));
        list.settle().unwrap();
        drop(list);
        assert_eq!(read(&disk.after_power_cut(|| false)), Ok(listed(3, 1..=3)));
    }

    #[test]
    fn a_poisoned_journal_changes_no_list() {
        let disk = SimDisk::new();
        let mut list = create(&disk, 1..=2);
        let poison = Poison::default();
        poison.set("test", &io::ErrorKind::Other.into());
        assert_eq!(list.add(3, &poison).unwrap_err().kind(), ErrorKind::Poisoned);
        assert_eq!(disk.calls(DiskOp::Overwrite), 0);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_a_list_of_numbers_in_order_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(found) = Listed::decode(&bytes, 1 << 46) {
                prop_assert_eq!(found.encode(), bytes);
                prop_assert!(found.numbers.last().is_none_or(|last| *last <= found.upto));
            }
        }
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let encoded = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        for words in [&[][..], &[1, 0], &[3, 2, 1], &[3, 2, 2], &[3, 4], &[1 << 46]] {
            assert_eq!(Listed::decode(&encoded(words), 1 << 46), None, "{words:?}");
        }
        assert_eq!(Listed::decode(&encoded(&[3, 1, 3]), 1 << 46), Some(listed(3, [1, 3])));
        assert_eq!(Listed::decode(&encoded(&[3])[..7], 1 << 46), None);
    }
}

//! A caller that uses the whole interface, at random, and badly.

use crate::client::{Asked, Asking, Client, Owned};
use crate::random::Random;
use crate::story::{FIRST_SINGLE, SHORTEST};
use oncekey::Durability;
use std::time::Duration;

/// Keys that all callers share; small numbers are asked for most.
pub const KEYS: u64 = 1_500;
/// Those of them whose answers may be kept for ever.
const FOR_EVER_EVERY: u64 = 8;
/// So many of them are asked for by everybody.
const POPULAR: u64 = 12;
/// Keys that one caller has at a time.
const AT_ONCE: usize = 3;

/// Few, since a disk's sync takes as long as a thousand other operations.
const SYNCED_EVERY: u64 = 100;
/// How much more often everything rare happens in a short life.
const HASTE: u64 = 64;

pub struct Caller<'c> {
    client: &'c Client<'c>,
    random: Random,
    owned: Vec<Owned>,
    next_single: u64,
    keys: u64,
    is_short_lived: bool,
    /// How to let the leases at hand run out.
    stall: &'c dyn Fn(&mut Random),
}

impl<'c> Caller<'c> {
    /// `number` is one that no other caller of the run has.
    pub fn new(
        client: &'c Client<'c>,
        random: Random,
        number: u64,
        (keys, is_short_lived): (u64, bool),
        stall: &'c dyn Fn(&mut Random),
    ) -> Caller<'c> {
        Caller {
            client,
            random,
            owned: Vec::new(),
            next_single: FIRST_SINGLE + (number << 32),
            keys,
            is_short_lived,
            stall,
        }
    }

    pub fn step(&mut self) {
        if self.random.one_in(256) {
            (self.stall)(&mut self.random);
        }
        if self.owned.is_empty() || self.owned.len() < AT_ONCE && self.random.one_in(2) {
            return self.ask();
        }
        let at = self.random.below(self.owned.len() as u64) as usize;
        match self.random.below(16) {
            0 => {
                let len = self.len();
                self.client.point(&mut self.owned[at], len);
            }
            1 => {
                let lease = self.random.of_any_size(5, 17);
                self.client.renew(&mut self.owned[at], lease);
            }
            2 | 3 => {
                let owned = self.owned.swap_remove(at);
                self.client.release(owned);
            }
            4 => {
                let owned = self.owned.swap_remove(at);
                self.client.drop(owned);
            }
            _ => {
                let owned = self.owned.swap_remove(at);
                self.end(owned);
            }
        }
    }

    fn seldom(&mut self, times: u64) -> bool {
        self.random.one_in(if self.is_short_lived { (times / HASTE).max(2) } else { times })
    }

    fn ask(&mut self) {
        let is_single = self.random.one_in(40);
        let key = if is_single {
            self.next_single += 1;
            self.next_single
        } else {
            let most = if self.random.one_in(3) { POPULAR } else { self.keys };
            let below = 1 + self.random.below(most);
            self.random.below(below)
        };
        if !is_single && self.seldom(4_000) {
            return self.client.erase_scope(key);
        }
        if self.random.one_in(8) {
            return self.client.get(key);
        }
        let asking = Asking {
            print: u8::from(self.random.one_in(16)),
            lease: (!self.random.one_in(16)).then(|| self.random.of_any_size(5, 17)),
            durability: if self.seldom(SYNCED_EVERY) { Durability::Synced } else { Durability::Buffered },
        };
        match self.client.reserve(key, asking) {
            Asked::Owned(owned) => self.owned.push(owned),
            Asked::Answer(answer) => {
                if answer.until.is_none() && self.seldom(64) || self.seldom(4_000) {
                    self.client.erase(key);
                }
            }
            Asked::Pending(pending) => {
                if self.random.one_in(2) {
                    let at_most = Duration::from_micros(self.random.of_any_size(4, 12));
                    self.client.wait(key, pending, at_most);
                }
            }
            Asked::Neither => {}
        }
    }

    fn end(&mut self, owned: Owned) {
        let key = owned.key;
        let is_single = key >= FIRST_SINGLE;
        let may_stay = is_single || key.is_multiple_of(FOR_EVER_EVERY);
        let keep = (!(may_stay && self.random.one_in(3))).then(|| self.random.of_any_size(3, 22));
        let (len, failure) = (self.len(), self.random.one_in(8));
        self.client.answer(owned, len, failure, keep);
        // Erasing reads the whole journal; the others are erased when the run ends, or expire.
        if is_single && (keep.is_none() && self.random.one_in(2) || self.seldom(64)) {
            self.client.erase(key);
        }
    }

    fn len(&mut self) -> usize {
        match self.random.below(16) {
            0 => 0,
            _ if self.seldom(16) => SHORTEST + self.random.below(8 * 1024) as usize,
            _ => SHORTEST + self.random.below(300) as usize,
        }
    }
}

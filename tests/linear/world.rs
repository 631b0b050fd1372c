//! What all callers share: the store in its present life, the clock that it goes by, and the order of moments.

use crate::threads::{self, Atomic, Mutex, MutexGuard};
use oncekey::testing::SimDisk;
use oncekey::{Builder, Clock, Durability, ErrorKind, Store};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A mutex for people who give up at a panic.
#[derive(Debug)]
pub struct Lock<T>(Mutex<T>);

impl<T> Lock<T> {
    pub fn new(value: T) -> Self {
        Lock(Mutex::new(value))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("nobody panics under a lock")
    }
}

pub struct World {
    pub clock: Arc<Time>,
    moments: Atomic,
    life: Atomic,
    builder: Builder,
    place: Place,
    present: Lock<Present>,
}

/// Where a world's store lives.
#[derive(Debug)]
pub enum Place {
    Memory,
    #[cfg_attr(oncekey_shuttle, expect(dead_code, reason = "real files are for real threads"))]
    Dir(tempfile::TempDir),
    /// Here a store can die, too.
    Disk(Lock<SimDisk>),
}

struct Present {
    store: Option<Store>,
    deaths: Vec<Death>,
}

/// Between which moments a life of the store ended without its callers being told.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    pub life: u32,
    pub called: u64,
    pub returned: u64,
}

pub struct Restart {
    pub called: u64,
    pub returned: u64,
}

/// A caller's handle to the store.
pub struct Ground {
    pub life: u32,
    pub store: Option<Store>,
}

impl Ground {
    pub fn store(&self) -> &Store {
        self.store.as_ref().expect("a caller between two lives calls nobody")
    }
}

/// Milliseconds that the callers move. Each thread remembers what it read last.
#[derive(Debug)]
pub struct Time(Atomic);

const START_MS: u64 = 1_767_225_600_000;

impl Time {
    pub fn look(&self) -> u64 {
        START_MS + self.0.load(Ordering::SeqCst)
    }

    pub fn advance(&self, ms: u64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Clock for Time {
    fn now_ms(&self) -> u64 {
        let now_ms = self.look();
        threads::read(now_ms);
        // The store is about to lock: the best moment for others to come first.
        threads::dawdle();
        now_ms
    }
}

impl World {
    pub fn new(place: Place, durability: Durability, settings: impl FnOnce(Builder) -> Builder) -> Self {
        let clock = Arc::new(Time(Atomic::new(0)));
        let builder = Store::builder().clock(Arc::clone(&clock)).background(false).durability(durability);
        let builder = settings(builder.segment_size(64 * 1024));
        let world = World {
            clock,
            moments: Atomic::new(1),
            life: Atomic::new(0),
            builder,
            place,
            present: Lock::new(Present { store: None, deaths: Vec::new() }),
        };
        let store = world.open();
        world.present.lock().store = Some(store);
        world
    }

    /// A point in the order of all that happens.
    pub fn moment(&self) -> u64 {
        self.moments.fetch_add(1, Ordering::SeqCst)
    }

    pub fn life(&self) -> u32 {
        self.life.load(Ordering::SeqCst) as u32
    }

    /// The store, once it is open.
    pub fn ground(&self) -> Ground {
        loop {
            let present = self.present.lock();
            if let Some(store) = &present.store {
                return Ground { life: self.life(), store: Some(store.clone()) };
            }
            drop(present);
            threads::give_way();
        }
    }

    /// Lives that ended without telling.
    pub fn deaths(&self) -> Vec<Death> {
        self.present.lock().deaths.clone()
    }

    fn open(&self) -> Store {
        loop {
            let builder = self.builder.clone();
            let opened = match &self.place {
                Place::Memory => builder.in_memory(),
                Place::Dir(dir) => builder.open(dir.path()),
                Place::Disk(disk) => builder.open_simulated(&disk.lock()),
            };
            match opened {
                Ok(store) => return store,
                // Somebody still has a handle of the life before.
                Err(error) if error.kind() == ErrorKind::Locked => threads::give_way(),
                Err(error) => threads::give_up(&format!("the store does not open: {error}")),
            }
        }
    }

    /// Ends this life of the store and begins the next, unless somebody else just did.
    pub fn restart(&self, life: u32, dies: bool) -> Option<Restart> {
        let mut present = self.present.lock();
        if self.life() != life || matches!(self.place, Place::Memory) {
            return None;
        }
        let store = present.store.take()?;
        self.life.fetch_add(1, Ordering::SeqCst);
        drop(present);
        let called = self.moment();
        let mut returned = None;
        if let Place::Disk(disk) = &self.place
            && dies
        {
            let left = disk.lock().after_process_death();
            let death = Death { life, called, returned: self.moment() };
            self.present.lock().deaths.push(death);
            *disk.lock() = left;
            returned = Some(death.returned);
        }
        if let Err(error) = store.close() {
            threads::give_up(&format!("the store does not close: {error}"));
        }
        let store = self.open();
        let returned = returned.unwrap_or_else(|| self.moment());
        self.present.lock().store = Some(store);
        Some(Restart { called, returned })
    }
}

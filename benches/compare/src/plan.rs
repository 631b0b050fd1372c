//! What is measured: groups of cells that take turns, so that what else the machine does hits all of a row alike.

use crate::cell::{Job, KeyForm, Level, PeerName, Subject, Workload};

/// Cells of one row of the tables; each round measures each of them once, in this order.
pub struct Group {
    pub items: Vec<Item>,
}

#[derive(Clone)]
pub struct Item {
    pub subject: Subject,
    pub job: Job,
    pub rounds: usize,
    pub limit_s: f64,
}

/// What the command line leaves of a plan.
pub struct Choice {
    pub peers: Vec<PeerName>,
    pub workloads: Vec<Workload>,
    pub keys: Vec<u64>,
    pub rounds: Option<usize>,
}

pub const MILLION: u64 = 1_000_000;
pub const KIB: usize = 1024;

/// Data of one cell; fewer keys are measured where answers are long.
const MOST_BYTES: u64 = 4 << 30;

/// Those that live in memory.
const MAPS: [PeerName; 4] = [PeerName::Dashmap, PeerName::Scc, PeerName::QuickCache, PeerName::Moka];
/// Those that keep what they have.
pub const STORES: [PeerName; 7] = [
    PeerName::Lmdb,
    PeerName::Redb,
    PeerName::Fjall,
    PeerName::Sled,
    PeerName::Sqlite,
    PeerName::Rocksdb,
    PeerName::Redis,
];
/// Those at the power-loss level.
pub const DURABLE: [PeerName; 6] =
    [PeerName::Fjall, PeerName::Redis, PeerName::Rocksdb, PeerName::Lmdb, PeerName::Sqlite, PeerName::Redb];

/// The subject that the others vary: binary keys, 128-byte answers.
pub fn subject(peer: PeerName, level: Level, keys: u64, threads: usize) -> Subject {
    Subject { peer, level, keys, key_form: KeyForm::Binary, answer_len: 128, threads }
}

/// All peers that are no more than `kill -9` safe.
fn everybody() -> Vec<(PeerName, Level)> {
    let at = |level| move |peer| (peer, level);
    let ours = [PeerName::Oncekey, PeerName::Floor];
    let memory = ours.into_iter().chain(MAPS).map(at(Level::Memory));
    memory.chain(ours.into_iter().chain(STORES).map(at(Level::Kill))).collect()
}

fn run(then: &[Workload]) -> Job {
    Job::Run { then: then.to_vec() }
}

/// A few minutes: each aim at a million keys. The peers that aims name have several rounds, the others one.
pub fn quick() -> Vec<Group> {
    use PeerName::{Dashmap, Floor, Lmdb, Oncekey, Scc};
    let replays = run(&[Workload::Replay, Workload::Mixed]);
    let core = [
        (Dashmap, Level::Memory),
        (Oncekey, Level::Memory),
        (Scc, Level::Memory),
        (Oncekey, Level::Kill),
        (Floor, Level::Kill),
        (Lmdb, Level::Kill),
    ];
    let item = |subject, job: &Job, rounds, limit_s| Item { subject, job: job.clone(), rounds, limit_s };

    let mut base: Vec<_> =
        core.iter().map(|(peer, level)| item(subject(*peer, *level, MILLION, 1), &replays, 3, 1.5)).collect();
    let others = everybody().into_iter().filter(|other| !core.contains(other));
    base.extend(others.map(|(peer, level)| item(subject(peer, level, MILLION, 1), &replays, 1, 1.0)));

    let two = core.iter().filter(|(peer, level)| *level == Level::Kill || matches!(peer, Dashmap | Scc));
    let two = two.map(|(peer, level)| item(subject(*peer, *level, MILLION, 2), &run(&[]), 2, 2.0)).collect();

    let long = [(Dashmap, Level::Memory), (Oncekey, Level::Kill)].map(|(peer, level)| {
        let subject = Subject { answer_len: KIB, ..subject(peer, level, MILLION, 1) };
        item(subject, &run(&[]), 2, 2.0)
    });
    let timed = core[..5].iter().filter(|(_, level)| *level == Level::Kill).chain(&core[..3]);
    let timed = timed.map(|(peer, level)| item(subject(*peer, *level, MILLION, 1), &Job::Latency, 2, 2.0)).collect();
    let herd = [(Scc, Level::Memory), (Oncekey, Level::Memory), (Oncekey, Level::Kill)];
    let herd = herd.map(|(peer, level)| item(subject(peer, level, MILLION, 2), &Job::Herd, 2, 2.0));
    let expire = [(Oncekey, Level::Kill), (Dashmap, Level::Memory)];
    let expire = expire.map(|(peer, level)| item(subject(peer, level, MILLION, 1), &Job::Expire, 1, 2.0));
    let reopen = [(Oncekey, 2), (Lmdb, 1)];
    let reopen = reopen.map(|(peer, rounds)| item(subject(peer, Level::Kill, MILLION, 1), &Job::Fill, rounds, 2.0));

    let mut groups = vec![base, two, long.to_vec(), timed];
    groups.extend([1, 8, 64].map(|threads| synced(threads, 100_000, 1, 1.0)));
    groups.extend([herd.to_vec(), expire.to_vec(), reopen.to_vec()]);
    groups.into_iter().map(|items| Group { items }).collect()
}

fn synced(threads: usize, keys: u64, rounds: usize, limit_s: f64) -> Vec<Item> {
    let peers = [PeerName::Oncekey, PeerName::Floor].into_iter().chain(DURABLE);
    let item = |peer| Item { subject: subject(peer, Level::Power, keys, threads), job: run(&[]), rounds, limit_s };
    peers.map(item).collect()
}

/// Hours: one parameter at a time is varied, around a million binary keys with answers of 128 bytes.
pub fn full() -> Vec<Group> {
    const ROUNDS: usize = 3;
    const LIMIT_S: f64 = 10.0;
    let shapes = [
        (MILLION / 10, KeyForm::Binary, 128),
        (MILLION, KeyForm::Binary, 128),
        (10 * MILLION, KeyForm::Binary, 128),
        (MILLION, KeyForm::Text, 128),
        (MILLION, KeyForm::Binary, KIB),
        (MILLION, KeyForm::Binary, 64 * KIB),
    ];
    let mut groups = Vec::new();
    for threads in [1, 2] {
        for (keys, key_form, answer_len) in shapes {
            let keys = keys.min(MOST_BYTES / (answer_len + 64) as u64);
            let of = |job: &Job, (peer, level): &(PeerName, Level)| Item {
                subject: Subject { peer: *peer, level: *level, keys, key_form, answer_len, threads },
                job: job.clone(),
                rounds: ROUNDS,
                limit_s: LIMIT_S,
            };
            let all = everybody();
            let replays = run(&[Workload::Replay, Workload::Mixed]);
            groups.push(all.iter().map(|peer| of(&replays, peer)).collect());
            // The slow ones were timed while they filled.
            let fast = all.iter().filter(|(peer, level)| *level == Level::Memory || peer.is_ours());
            groups.push(fast.map(|peer| of(&Job::Latency, peer)).collect());
        }
    }
    for threads in [1, 8, 64] {
        groups.push(synced(threads, MILLION, ROUNDS, 5.0));
    }
    let each = |job: Job, keys, threads, peers: Vec<(PeerName, Level)>| {
        peers
            .into_iter()
            .map(|(peer, level)| Item {
                subject: subject(peer, level, keys, threads),
                job: job.clone(),
                rounds: ROUNDS,
                limit_s: LIMIT_S,
            })
            .collect::<Vec<_>>()
    };
    groups.push(each(Job::Herd, MILLION, 2, everybody()));
    let reclaims = everybody().into_iter().filter(|(peer, _)| peer.reclaims()).collect();
    groups.push(each(Job::Expire, MILLION, 1, reclaims));
    for keys in [MILLION, 10 * MILLION] {
        let stores = everybody().into_iter().filter(|(peer, level)| *level == Level::Kill && *peer != PeerName::Floor);
        groups.push(each(Job::Fill, keys, 1, stores.collect()));
    }
    groups.into_iter().map(|items| Group { items }).collect()
}

impl Choice {
    /// The plan without what wasn't asked for.
    pub fn of(&self, plan: Vec<Group>) -> Vec<Group> {
        let groups = plan
            .into_iter()
            .map(|group| Group { items: group.items.into_iter().filter_map(|item| self.item(item)).collect() });
        groups.filter(|group| !group.items.is_empty()).collect()
    }

    fn item(&self, mut item: Item) -> Option<Item> {
        let wants = |workload| self.workloads.is_empty() || self.workloads.contains(&workload);
        let is_wanted = match &mut item.job {
            Job::Run { then } => {
                then.retain(|workload| wants(*workload));
                wants(Workload::Fresh) || !then.is_empty()
            }
            Job::Latency => wants(Workload::Fresh),
            Job::Herd => wants(Workload::Herd),
            Job::Expire => wants(Workload::Expire),
            Job::Fill | Job::Reopen { .. } => wants(Workload::Reopen),
        };
        let is_wanted = is_wanted
            && (self.peers.is_empty() || self.peers.contains(&item.subject.peer))
            && (self.keys.is_empty() || self.keys.contains(&item.subject.keys));
        if let Some(rounds) = self.rounds {
            item.rounds = rounds;
        }
        is_wanted.then_some(item)
    }
}

//! Kills under load: of the gateway, of the service, of clients. No key runs twice, and no answer changes.

use crate::client::{Answer, Client, post};
use crate::ledger::Ledger;
use crate::process::Setup;
use fastrand::Rng;
use std::net::SocketAddr;
use std::sync::{Condvar, Mutex};
use std::thread::{self, yield_now};

const CLIENTS: usize = 4;
const KEYS: usize = 150;
const KILLS: usize = 12;
/// Requests between two kills, at least; at most they are twice as many, and a few more.
const PACE: usize = 8;
/// Requests that are there for a kill to meet.
const SLACK: usize = 6;
/// Duplicates wait for what runs, rather than to ask all the time.
const WAIT: &str = "[policy]\nwait = \"10s\"\n";

#[test]
fn a_gateway_killed_under_load_runs_no_key_twice_buffered() {
    storm(|setup| setup.flag("--durability", "buffered"), Victims { gateway: true, ..Victims::default() });
}

#[test]
fn a_gateway_killed_under_load_runs_no_key_twice_synced() {
    storm(|setup| setup.flag("--durability", "synced").file(WAIT), Victims { gateway: true, ..Victims::default() });
}

#[test]
fn a_service_killed_under_load_runs_no_key_twice() {
    let ends = storm(
        // An unused connection to it is given up soon, so there are fresh ones as well.
        |setup| setup.flag("--upstream-keep-alive", "20ms").file(WAIT),
        Victims { service: true, ..Victims::default() },
    );
    assert!(ends.refused >= ends.kills, "{ends:?}");
}

#[test]
fn clients_killed_under_load_leave_nothing_unknown() {
    let ends = storm(|setup| setup.file(WAIT), Victims { clients: true, ..Victims::default() });
    assert!(ends.left > KEYS / 4, "{ends:?}");
    assert_eq!(ends.unknown, 0, "{ends:?}");
}

#[test]
fn all_of_them_killed_under_load_run_no_key_twice() {
    let ends = storm(
        |setup| setup.flag("--durability", "buffered").file(WAIT),
        Victims { gateway: true, service: true, clients: true },
    );
    assert!(ends.left > KEYS / 4 && ends.refused > 0, "{ends:?}");
}

/// Who is killed.
#[derive(Clone, Copy, Default)]
struct Victims {
    gateway: bool,
    service: bool,
    clients: bool,
}

/// How often requests ended in a way.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    /// Without those that only asked again for what runs.
    sent: usize,
    /// May be sent before the next kill.
    quota: usize,
    answered: usize,
    /// Found no service.
    refused: usize,
    /// The service was gone in the middle.
    lost: usize,
    /// The gateway was gone in the middle, or was not there.
    broken: usize,
    /// Clients that were gone in the middle.
    left: usize,
    in_flight: usize,
    /// Told that the outcome is not known.
    unknown: usize,
    /// Clients that have all their answers.
    done: usize,
    kills: usize,
}

/// What clients and killer know of each other.
struct Field {
    seed: u64,
    victims: Victims,
    /// Where the gateway is, while it is there.
    door: Mutex<Option<SocketAddr>>,
    opened: Condvar,
    ends: Mutex<Ends>,
    changed: Condvar,
}

impl Field {
    fn door(&self) -> SocketAddr {
        self.opened.wait_while(self.door.lock().unwrap(), |door| door.is_none()).unwrap().unwrap()
    }

    fn open(&self, address: Option<SocketAddr>) {
        *self.door.lock().unwrap() = address;
        self.opened.notify_all();
    }

    /// Waits until one more may be sent.
    fn send(&self) {
        let mut ends = self.changed.wait_while(self.ends.lock().unwrap(), |ends| ends.sent >= ends.quota).unwrap();
        ends.sent += 1;
        drop(ends);
        self.changed.notify_all();
    }

    fn note(&self, what: impl FnOnce(&mut Ends)) {
        what(&mut self.ends.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until it is so, or all is over.
    fn wait_until(&self, is_so: impl Fn(&Ends) -> bool) {
        let ends = self.ends.lock().unwrap();
        drop(self.changed.wait_while(ends, |ends| !is_so(ends) && ends.done < CLIENTS).unwrap());
    }

    fn ends(&self) -> Ends {
        *self.ends.lock().unwrap()
    }
}

fn storm(configure: impl FnOnce(Setup) -> Setup, victims: Victims) -> Ends {
    let seed = std::env::var("GATEWAY_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("GATEWAY_SEED={seed}");
    let mut ledger = Ledger::start();
    let mut gateway = configure(Setup::for_url(&ledger.url())).start();
    let field = Field {
        seed,
        victims,
        door: Mutex::new(Some(gateway.address)),
        opened: Condvar::new(),
        ends: Mutex::default(),
        changed: Condvar::new(),
    };
    let mut random = Rng::with_seed(seed);
    let known = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                scope.spawn({
                    let field = &field;
                    move || client(field, number)
                })
            })
            .collect();
        for _ in 0..KILLS {
            let sent = field.ends().sent + random.usize(PACE..2 * PACE);
            field.note(|ends| ends.quota = sent + SLACK);
            field.wait_until(|ends| ends.sent >= sent);
            // To anywhere in a request.
            (0..random.u32(..30)).for_each(|_| yield_now());
            if victims.service && (!victims.gateway || random.bool()) {
                ledger.kill();
                let refused = field.ends().refused;
                field.note(|ends| ends.quota = usize::MAX);
                field.wait_until(|ends| ends.refused > refused);
                ledger.restart();
                field.note(|ends| ends.kills += usize::from(ends.done < CLIENTS));
            } else if victims.gateway {
                field.note(|ends| ends.kills += usize::from(ends.done < CLIENTS));
                let setup = gateway.kill();
                field.open(None);
                gateway = setup.start();
                field.open(Some(gateway.address));
            }
        }
        field.note(|ends| ends.quota = usize::MAX);
        clients.into_iter().map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    let ends = field.ends();
    println!("{ends:?}");
    if victims.gateway || victims.service {
        assert!(ends.kills >= 12, "{ends:?}");
    }

    let runs = ledger.runs();
    let mut last = Client::connect(gateway.address);
    for number in 0..KEYS {
        let name = key(number);
        let runs = runs.get(&name).map_or(&[][..], Vec::as_slice);
        assert!(runs.len() <= 1, "{name} ran as {runs:?}");
        let now = last.ask(post("/", &name, "{}"));
        let seen: Vec<_> = known.iter().filter_map(|keys| keys[number].as_ref()).collect();
        assert_eq!(seen.len(), 2, "{name}");
        if now.status == 201 {
            assert_eq!(now.header("idempotency-replayed"), Some("true"), "{name}");
            assert_eq!(now.header("x-run"), runs.first().map(String::as_str), "{name}");
            for seen in seen {
                let Seen::Answer(seen) = seen else { panic!("{name} was unknown and has an answer now") };
                assert_eq!((&seen.body, seen.header("x-run")), (&now.body, now.header("x-run")), "{name}");
            }
        } else {
            assert_eq!(now.problem(), "outcome-unknown", "{name}");
            assert!(seen.iter().all(|seen| matches!(seen, Seen::Unknown)), "{name} had an answer and is unknown now");
        }
    }
    assert_eq!(ledger.runs(), runs, "a replay ran");
    ends
}

fn key(number: usize) -> String {
    format!("order-{number}")
}

/// What a client was told of a key at last.
#[derive(Debug)]
enum Seen {
    Answer(Answer),
    Unknown,
}

/// Asks for half of all keys, each of which another client asks for at about the same time.
fn client(field: &Field, number: usize) -> Vec<Option<Seen>> {
    let mut random = Rng::with_seed(field.seed ^ (number as u64 + 1));
    let mut connection = None;
    let mut known: Vec<_> = (0..KEYS).map(|_| None).collect();
    for at in (0..KEYS).filter(|at| at % 2 == number % 2) {
        known[at] = Some(ask_until_told(field, &mut connection, &key(at), &mut random));
    }
    field.note(|ends| ends.done += 1);
    known
}

fn ask_until_told(field: &Field, connection: &mut Option<Client>, key: &str, random: &mut Rng) -> Seen {
    let request = post("/", key, "{}");
    let mut began = Vec::new();
    let mut is_running = false;
    loop {
        if !is_running {
            field.send();
        }
        is_running = false;
        let door = field.door();
        let Some(mut client) = connection.take().or_else(|| Client::try_connect(door).ok()) else {
            field.note(|ends| ends.broken += 1);
            continue;
        };
        if field.victims.clients && random.u8(..3) == 0 {
            leave(client, key, request.as_bytes(), random);
            field.note(|ends| ends.left += 1);
            continue;
        }
        let answer = client.try_send(&request).ok().and_then(|()| client.try_answer(false));
        let Some(answer) = answer else {
            field.note(|ends| ends.broken += 1);
            continue;
        };
        if answer.status == 201 {
            // Also what broke off was the beginning of the one answer.
            let len = answer.body.len().min(began.len());
            assert_eq!(answer.body[..len], began[..len], "{key}");
            if answer.is_whole {
                assert_eq!(len, began.len(), "{key}");
                field.note(|ends| ends.answered += 1);
                *connection = Some(client);
                return Seen::Answer(answer);
            }
            field.note(|ends| ends.broken += 1);
            began = answer.body;
            continue;
        }
        if !answer.is_whole {
            field.note(|ends| ends.broken += 1);
            continue;
        }
        *connection = Some(client);
        match (answer.status, answer.problem().as_str()) {
            (409, "in-flight") => {
                field.note(|ends| ends.in_flight += 1);
                is_running = true;
                yield_now();
            }
            (502, "upstream-unreachable") if field.victims.service => {
                field.note(|ends| ends.refused += 1);
                yield_now();
            }
            (502, "upstream-lost") if field.victims.service => field.note(|ends| ends.lost += 1),
            (409, "outcome-unknown") => {
                field.note(|ends| ends.unknown += 1);
                return Seen::Unknown;
            }
            (status, problem) => panic!("{key}: {status} {problem}"),
        }
    }
}

/// Sends a part of a request, or reads a part of the answer, and is gone.
fn leave(mut client: Client, key: &str, request: &[u8], random: &mut Rng) {
    let sent = random.usize(..2 * request.len()).min(request.len());
    // It may be the gateway that is gone first.
    if client.try_send(&request[..sent]).is_err() || sent < request.len() {
        return;
    }
    if random.bool() {
        // Less than any head has.
        client.bytes(random.usize(..80));
    } else if client.head().is_some_and(|head| head.status == 201) && Ledger::is_long(key) {
        client.bytes(random.usize(..100_000));
    }
}

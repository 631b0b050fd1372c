//! What clients of a shop do all day: pay, retry, look, and get it wrong.

use crate::client::{Answer, Client, get, post_with};
use crate::shop::PAYMENTS;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Who asks which gateway.
#[derive(Clone, Copy)]
pub struct Customer<'a> {
    pub address: SocketAddr,
    pub credential: Option<&'a str>,
}

impl Customer<'_> {
    pub fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    pub fn post(&self, path: &str, key: &str, body: &str) -> String {
        self.post_with(path, &[("idempotency-key", key)], body)
    }

    fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &str) -> String {
        let mut headers = headers.to_vec();
        headers.extend(self.credential.map(|credential| ("authorization", credential)));
        post_with(path, &headers, body)
    }
}

/// Clients that go on until they are told to end.
pub struct Traffic {
    is_over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    pub fn start(customer: &Customer<'static>, seed: u64) -> Traffic {
        let is_over = Arc::new(AtomicBool::new(false));
        let clients = [shop, shop, duplicate, storm as fn(&mut Round)]
            .into_iter()
            .zip(seed..)
            .map(|(client, seed)| {
                let mut round = Round {
                    customer: *customer,
                    client: customer.connect(),
                    random: fastrand::Rng::with_seed(seed),
                    number: 0,
                    known: Vec::new(),
                    started: Instant::now(),
                };
                let is_over = Arc::clone(&is_over);
                std::thread::spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        round.number += 1;
                        client(&mut round);
                    }
                })
            })
            .collect();
        Traffic { is_over, clients }
    }

    /// What the clients panicked with.
    pub fn end(self) -> Vec<String> {
        self.is_over.store(true, Ordering::Relaxed);
        let ended = self.clients.into_iter().map(JoinHandle::join);
        ended
            .filter_map(Result::err)
            .map(|panic| panic.downcast::<String>().map_or_else(|_| "it panicked".to_owned(), |text| *text))
            .collect()
    }
}

/// A client before its next request.
struct Round {
    customer: Customer<'static>,
    client: Client,
    random: fastrand::Rng,
    number: u64,
    /// Keys of this client that have an answer.
    known: Vec<String>,
    started: Instant,
}

impl Round {
    fn fresh_key(&mut self) -> String {
        format!("{:032x}", self.random.u128(..))
    }

    fn pay(&mut self, key: &str, body: &str) -> Answer {
        self.client.ask(self.customer.post(PAYMENTS, key, body))
    }

    /// A pause of clients that aren't in a hurry.
    fn pause(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.random.u64(most_ms / 4..most_ms)));
    }
}

/// Mostly new payments, many looks, some retries, and a few mistakes.
fn shop(round: &mut Round) {
    let busy = 60.0 + 30.0 * (round.started.elapsed().as_secs_f64() / 17.0).sin();
    round.pause(busy as u64);
    let known = round.random.choice(&round.known).cloned();
    match (round.random.u32(..100), known) {
        (0..=19, Some(key)) => {
            let again = round.pay(&key, "{}");
            assert_eq!((again.status, again.header("idempotency-replayed")), (201, Some("true")), "{again:?}");
        }
        (20..=21, Some(key)) => assert_eq!(round.pay(&key, "{\"amount\": 1}").status, 422),
        (22..=23, _) => {
            let keyless = round.customer.post_with("/v1/refunds", &[], "{}");
            assert_eq!(round.client.ask(keyless).status, 400);
        }
        (24..=49, _) => assert_eq!(round.client.ask(get(PAYMENTS, &[])).status, 200),
        (_, _) => {
            let key = round.fresh_key();
            assert_eq!(round.pay(&key, "{}").status, 201);
            round.known.push(key);
        }
    }
}

/// The same request twice at a time: refused on one path, following the other's answer on the other.
fn duplicate(round: &mut Round) {
    round.pause(800);
    let path = if round.number.is_multiple_of(2) { "/v1/transfers" } else { "/v1/reports" };
    let key = round.fresh_key();
    let request = round.customer.post(path, &key, "{}");
    let mut other = round.customer.connect();
    round.client.send(&request);
    other.send(&request);
    // Either may be first; on a machine that is held up, one may come after the other's end.
    let mut statuses = [round.client.answer(false).status, other.answer(false).status];
    statuses.sort_unstable();
    assert!(matches!(statuses, [201, 201 | 409]), "{path}: {statuses:?}");
}

/// A client that, now and then, retries in a loop.
fn storm(round: &mut Round) {
    const FIRST_S: u64 = 14;
    const EVERY_S: u64 = 95;
    const LASTS_S: u64 = 6;
    let age_s = round.started.elapsed().as_secs();
    if age_s < FIRST_S || (age_s - FIRST_S) % EVERY_S >= LASTS_S {
        round.pause(100);
        return;
    }
    round.pause(20);
    // Connections don't outlive the calm between two storms.
    let again = round.customer.post(PAYMENTS, &format!("storm-{}", age_s / EVERY_S), "{}");
    assert_eq!(round.customer.connect().ask(again).status, 201);
}

//! The service behind the gateway, and the keys that the browser is sent to look for.

use crate::client::Client;
use crate::traffic::Customer;
use crate::upstream::{Act, Gate, Seen, Upstream};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// The shop has one route that needs a key, and one whose duplicates wait for the answer.
pub const SETTINGS: &str = "answer_timeout = \"10m\"

[[route]]
path = \"/v1/refunds\"
required = true

[[route]]
path = \"/v1/reports\"
wait = \"30s\"
";

pub const PAYMENTS: &str = "/v1/payments";
pub const COMPLETED: &str = "order-2026-11-04711";
pub const INTERRUPTED: &str = "order-2026-11-04712";
pub const RUNNING: &str = "order-2026-11-04713";
pub const ABSENT: &str = "order-2026-11-04714";

/// The running service.
pub struct Shop {
    pub upstream: Upstream,
    /// Told of each run that will not end.
    endless: Mutex<Receiver<()>>,
}

impl Shop {
    pub fn open() -> Shop {
        let (began, endless) = channel();
        let upstream = Upstream::start(move |seen| {
            match seen.header("idempotency-key") {
                Some(INTERRUPTED) => return Act::answer(502, "the bank did not say"),
                Some(RUNNING) => {
                    began.send(()).unwrap();
                    return Act::SendAndHang(Vec::new());
                }
                Some(_) | None => {}
            }
            if seen.target == "/v1/reports" {
                return report();
            }
            std::thread::sleep(takes(seen));
            let status = if seen.method == "GET" { 200 } else { 201 };
            Act::answer(
                status,
                &format!("{{\"id\": \"pay_{}\", \"amount\": 4200, \"currency\": \"EUR\"}}", seen.number),
            )
        });
        Shop { upstream, endless: Mutex::new(endless) }
    }

    /// Makes a completed key, an interrupted and a running one; the last for as long as what is returned is kept.
    pub fn make_known_keys(&self, customer: &Customer<'_>) -> Client {
        let mut client = customer.connect();
        let mut expect = |key, body, status| {
            let answer = client.ask(customer.post(PAYMENTS, key, body));
            assert_eq!(answer.status, status, "{key}: {answer:?}");
        };
        expect(COMPLETED, "{\"amount\": 4200}", 201);
        expect(COMPLETED, "{\"amount\": 4200}", 201);
        expect(COMPLETED, "{\"amount\": 9900}", 422);
        expect(INTERRUPTED, "{}", 502);
        expect(INTERRUPTED, "{}", 409);
        client.send(customer.post(PAYMENTS, RUNNING, "{}"));
        self.endless.lock().unwrap().recv_timeout(Duration::from_secs(30)).expect("the endless payment begins");
        client
    }
}

/// An answer that comes in parts, so that a duplicate can follow it while it does.
fn report() -> Act {
    let rest = Gate::default();
    let later = rest.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(250));
        later.open();
    });
    let first = b"HTTP/1.1 201 Created\r\ntransfer-encoding: chunked\r\n\r\n5\r\nRows \r\n";
    Act::At(rest, first.to_vec(), Box::new(Act::Send(b"4\r\ndone\r\n0\r\n\r\n".to_vec())))
}

/// A service is slow at times. What has duplicates while it runs is slower than those take to arrive.
fn takes(seen: &Seen) -> Duration {
    let fast_ms = 3 + seen.number as u64 * 7 % 11;
    Duration::from_millis(match seen.target.as_str() {
        "/v1/transfers" => 250,
        _ if seen.number.is_multiple_of(61) => 60 + fast_ms,
        _ => fast_ms,
    })
}

//! A service that is a process of its own, so it can be killed: this binary, started anew. It notes each run in a file and
//! then answers.

use crate::upstream::{Act, Seen, Upstream, answer};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Tells the process that it is the service: an address and a file.
const ORDERS: &str = "LEDGER_ORDERS";

/// The running service; killed where it is dropped.
pub struct Ledger {
    child: Child,
    pub address: SocketAddr,
    directory: TempDir,
}

impl Ledger {
    pub fn start() -> Ledger {
        let directory = TempDir::new().unwrap();
        // Nobody connects from this address, so its port is free again after a kill.
        let (child, address) = spawn("127.0.0.2:0".parse().unwrap(), &runs_in(&directory));
        Ledger { child, address, directory }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `kill -9`; nobody listens at its address after it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// A new process at the same address, with the same file.
    pub fn restart(&mut self) {
        (self.child, _) = spawn(self.address, &runs_in(&self.directory));
    }

    /// Whether the answer for a key has more than 100,000 bytes.
    pub fn is_long(key: &str) -> bool {
        number(key) % 3 == 2
    }

    /// The runs of each key, by their names.
    pub fn runs(&self) -> BTreeMap<String, Vec<String>> {
        let mut runs = BTreeMap::<_, Vec<_>>::new();
        // Without a run there is no file.
        for line in std::fs::read_to_string(runs_in(&self.directory)).unwrap_or_default().lines() {
            let (key, run) = line.split_once(' ').unwrap();
            runs.entry(key.to_owned()).or_default().push(run.to_owned());
        }
        runs
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn runs_in(directory: &TempDir) -> PathBuf {
    directory.path().join("runs")
}

fn spawn(address: SocketAddr, file: &Path) -> (Child, SocketAddr) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "ledger::the_process_of_the_service", "--nocapture"])
        .env(ORDERS, format!("{address} {}", file.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("serves at ")?.parse().ok());
    (child, address.expect("the service starts"))
}

#[test]
fn the_process_of_the_service() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    let (address, file) = orders.split_once(' ').unwrap();
    let file = PathBuf::from(file);
    let upstream = Upstream::on(address.parse().unwrap(), move |seen| run(seen, &file));
    println!("\nserves at {}", upstream.address);
    // Its end is the end of the test that started it.
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn number(key: &str) -> usize {
    key.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
}

fn run(seen: &Seen, file: &Path) -> Act {
    let key = seen.header("idempotency-key").unwrap();
    // No other run has this name.
    let name = format!("{}-{}", std::process::id(), seen.number);
    let mut file = OpenOptions::new().create(true).append(true).open(file).unwrap();
    file.write_all(format!("{key} {name}\n").as_bytes()).unwrap();
    let number = number(key);
    // Short ones are stored before their head is sent, long ones while they are.
    let body = format!("{key} ran as {name}\n").repeat([1, 100, 8000][number % 3]);
    let headers = [("x-run", name.as_str())];
    if number.is_multiple_of(2) {
        return Act::Send(answer(201, &headers, &body));
    }
    let head = format!("HTTP/1.1 201 Made\r\nx-run: {name}\r\ntransfer-encoding: chunked\r\n\r\n");
    let chunks: String = body
        .as_bytes()
        .chunks(50_000)
        .map(|chunk| format!("{:x}\r\n{}\r\n", chunk.len(), str::from_utf8(chunk).unwrap()))
        .collect();
    Act::Send(format!("{head}{chunks}0\r\n\r\n").into_bytes())
}

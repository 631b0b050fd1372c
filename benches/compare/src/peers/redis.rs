//! Redis over a Unix socket, to a server of its own on the cell's directory; a connection a thread.
//!
//! `SET key record NX GET PX lease` reserves and looks up in one round trip; `SET key record PX retention` completes.
//! The append-only file is in the page cache before the reply with `appendfsync everysec` (`kill -9` safe), and synced
//! before it with `always`, once for all replies of a turn of its loop. Snapshots and rewrites of that file are off.
//! Redis looks for expired keys by itself, ten times a second (`hz`).

use crate::cell::Level;
use crate::peer::{Completed, Decision, Load, Peer, Reclaim, Result, Session, Setup, record};
use crate::workload::{LEASE_MS, Watch};
use ::redis::{Client, Connection, ConnectionAddr};
use oncekey::Clock;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub struct Redis {
    server: Server,
    client: Client,
    watch: Arc<Watch>,
    reclaimed: AtomicU64,
}

pub struct RedisSession<'a> {
    peer: &'a Redis,
    connection: Connection,
    buffer: Vec<u8>,
}

/// Killed when dropped; by the kernel if this process is killed.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is fine too.
        if self.0.kill().is_ok() {
            self.0.wait().ok();
        }
    }
}

/// Whether there is a server to start.
pub fn is_installed() -> bool {
    Command::new("redis-server").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

fn start(dir: &Path, level: Level) -> Result<Server> {
    let fsync = if level == Level::Power { "always" } else { "everysec" };
    let log = File::create(dir.join("log"))?;
    // `setpriv` makes the kernel kill the server with its parent.
    let server = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "redis-server", "--port", "0", "--unixsocket", "socket", "--save", ""])
        .args(["--appendonly", "yes", "--appendfsync", fsync, "--auto-aof-rewrite-percentage", "0"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(Server(server))
}

impl Peer for Redis {
    type Session<'a> = RedisSession<'a>;

    fn open(setup: &Setup) -> Result<Self> {
        let server = start(&setup.dir, setup.level)?;
        // A socket's address has to be short; the directory's may be long.
        std::env::set_current_dir(&setup.dir)?;
        let client = Client::open(ConnectionAddr::Unix("socket".into()))?;
        let peer = Redis { server, client, watch: Arc::clone(&setup.watch), reclaimed: AtomicU64::new(0) };
        peer.wait_until_loaded()?;
        Ok(peer)
    }

    fn load(&self, load: &Load<'_>) -> Result<()> {
        let mut pipeline = ::redis::pipe();
        let mut buffer = Vec::new();
        load.each(|Completed { key, fingerprint, until_ms, answer }| {
            record::complete(&mut buffer, fingerprint, until_ms, answer);
            pipeline.cmd("SET").arg(key).arg(&buffer).arg("PXAT").arg(until_ms).ignore();
            Ok(())
        })?;
        Ok(pipeline.exec(&mut self.client.get_connection()?)?)
    }

    fn session(&self) -> RedisSession<'_> {
        let connection = self.client.get_connection().expect("the server takes connections");
        RedisSession { peer: self, connection, buffer: Vec::new() }
    }

    fn server(&self) -> Option<u32> {
        Some(self.server.0.id())
    }

    fn reclaims(&self) -> Option<&dyn Reclaim> {
        Some(self)
    }
}

impl Redis {
    fn wait_until_loaded(&self) -> Result<()> {
        for _ in 0..120_000 {
            let pong = self.client.get_connection().and_then(|mut it| ::redis::cmd("PING").query::<String>(&mut it));
            if pong.is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("redis-server doesn't answer; see its log".into())
    }

    fn expired(&self, connection: &mut Connection) -> u64 {
        let info: String = ::redis::cmd("INFO").arg("stats").query(connection).expect("the server answers");
        let count = info.lines().find_map(|line| line.strip_prefix("expired_keys:"));
        count.and_then(|count| count.trim().parse().ok()).expect("the server counts expired keys")
    }
}

impl Session for RedisSession<'_> {
    type Ticket = ();

    fn reserve(&mut self, key: &[u8], fingerprint: &[u8; 16]) -> Decision<()> {
        let now_ms = self.peer.watch.now_ms();
        let found: Option<Vec<u8>> = ::redis::cmd("SET")
            .arg(key)
            .arg(&record::reserved(fingerprint, now_ms)[..])
            .arg(&["NX", "GET", "PX"])
            .arg(LEASE_MS)
            .query(&mut self.connection)
            .expect("the server answers");
        match found {
            None => Decision::Fresh(()),
            // It expired between the server's look at its clock and ours.
            Some(found) => record::read(&found, fingerprint, now_ms).unwrap_or(Decision::InFlight),
        }
    }

    fn complete(&mut self, _ticket: (), key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) {
        let until_ms = self.peer.watch.kept_until_ms();
        record::complete(&mut self.buffer, fingerprint, until_ms, answer);
        ::redis::cmd("SET")
            .arg(key)
            .arg(&self.buffer)
            .arg("PXAT")
            .arg(until_ms)
            .exec(&mut self.connection)
            .expect("the server answers");
    }

    fn holds(&mut self, key: &[u8], fingerprint: &[u8; 16], answer: &[u8]) -> bool {
        let found: Option<Vec<u8>> =
            ::redis::cmd("GET").arg(key).query(&mut self.connection).expect("the server answers");
        found.is_some_and(|found| record::holds(&found, fingerprint, answer))
    }
}

impl Reclaim for Redis {
    fn follows_wall_clock(&self) -> bool {
        true
    }

    fn reclaim(&self, keys: u64, _is_alone: bool) {
        let until = self.reclaimed.fetch_add(keys, Ordering::Relaxed) + keys;
        let mut connection = self.client.get_connection().expect("the server takes connections");
        while self.expired(&mut connection) < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

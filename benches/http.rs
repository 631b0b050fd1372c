//! What the layer adds to an axum handler: a router is called in this process, with and without it, so no socket is measured.
//!
//! `cargo bench --features http --bench http`

#![allow(missing_docs, reason = "benches are not documented")]

use axum::body::Body;
use axum::extract::Request;
use axum::{Router, routing::post};
use bytes::Bytes;
use criterion::{Criterion, criterion_group, criterion_main};
use hdrhistogram::Histogram;
use http_body_util::BodyExt;
use oncekey::http::{IdempotencyLayer, Policy, Scope};
use oncekey::{Durability, Retention, Store};
use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tower::{Service, ServiceExt};

/// A JSON body of the size that payments have.
const BODY: &[u8] = br#"{"amount":4200,"currency":"EUR","source":"card_8e03978e40d543e8","description":"order 42"}"#;
/// Short, so that a long run doesn't fill memory and disk.
const RETENTION: Duration = Duration::from_secs(2);

async fn charge(body: Bytes) -> Bytes {
    body
}

fn bare() -> Router {
    Router::new().route("/charges", post(charge))
}

fn protected(store: Store) -> Router {
    let policy = Policy::new().retention(Retention::For(RETENTION));
    bare().layer(IdempotencyLayer::new(store, Scope::single_tenant()).policy(policy))
}

fn request(key: Option<&str>) -> Request {
    let request = Request::post("/charges").header("content-type", "application/json");
    let request = key.into_iter().fold(request, |request, key| request.header("idempotency-key", key));
    request.body(Body::from(BODY)).expect("it is well-formed")
}

/// A service as a connection has it: made once, called again and again.
async fn answer(router: &mut Router, request: Request) -> Bytes {
    let router = ServiceExt::<Request>::ready(router).await.expect("a router is always ready");
    let response = router.call(request).await.expect("a router never fails");
    assert!(response.status().is_success(), "{response:?}");
    response.into_body().collect().await.expect("the body is whole").to_bytes()
}

fn on_disk() -> (TempDir, Store) {
    let dir = match Path::new("/dev/shm") {
        shm if shm.is_dir() => tempfile::tempdir_in(shm),
        _ => tempfile::tempdir(),
    };
    let dir = dir.expect("there is room for a directory");
    let store = Store::builder().durability(Durability::Buffered).open(dir.path().join("store"));
    (dir, store.expect("an empty directory opens"))
}

/// Times each call by itself, and returns the median in microseconds: on a busy machine, criterion's means are far above it.
fn measure(
    criterion: &mut Criterion,
    name: &str,
    mut router: Router,
    mut key: impl FnMut() -> Option<String>,
) -> Option<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("it needs no thread");
    let mut calls = Histogram::<u64>::new(3).expect("three digits are in range");
    criterion.benchmark_group("http").bench_function(name, |bencher| {
        bencher.iter_custom(|times| {
            let mut sum = Duration::ZERO;
            for _ in 0..times {
                let request = request(key().as_deref());
                let start = Instant::now();
                let answered = runtime.block_on(answer(&mut router, request));
                let took = start.elapsed();
                drop(answered);
                calls.record(took.as_nanos() as u64).expect("the histogram resizes itself");
                sum += took;
            }
            sum
        });
    });
    (!calls.is_empty()).then(|| calls.value_at_quantile(0.5) as f64 / 1000.0)
}

fn fresh_keys() -> impl FnMut() -> Option<String> {
    let next = Cell::new(0u64);
    move || Some(format!("8e03978e-40d5-43e8-bc93-{:012x}", next.replace(next.get() + 1)))
}

fn layer(criterion: &mut Criterion) {
    let memory = || Store::builder().durability(Durability::Buffered).in_memory().expect("there is memory");
    let same = || Some("8e03978e-40d5-43e8-bc93-6894a57f9324".to_owned());
    let bare = measure(criterion, "bare", bare(), || None);
    let mut beside = |name, router, key: &mut dyn FnMut() -> Option<String>| {
        // Either is left out if the command line asks for another one.
        if let (Some(p50), Some(bare)) = (measure(criterion, name, router, key), bare) {
            println!("{name}: p50 {p50:.2} us, {:.2} us over the bare router's {bare:.2} us\n", p50 - bare);
        }
    };
    beside("without a key", protected(memory()), &mut || None);
    beside("fresh, in memory", protected(memory()), &mut fresh_keys());
    let (_dir, store) = on_disk();
    beside("fresh, buffered", protected(store), &mut fresh_keys());
    beside("replay, in memory", replaying(memory()), &mut { same });
    let (_dir, store) = on_disk();
    beside("replay, buffered", replaying(store), &mut { same });
    beside("fresh, in memory, by default", protected(Store::in_memory().expect("there is memory")), &mut fresh_keys());
}

/// Keeps its answers for long.
fn replaying(store: Store) -> Router {
    bare().layer(IdempotencyLayer::new(store, Scope::single_tenant()))
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(4)).warm_up_time(Duration::from_secs(1));
    targets = layer
}
criterion_main!(benches);

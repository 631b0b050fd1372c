//! What the layer adds to an axum handler: a router is called in this process, with and without it, so no socket is measured.
//!
//! `cargo bench --features http --bench http`

#![allow(missing_docs, reason = "benches are not documented")]

use axum::body::Body;
use axum::extract::Request;
use axum::{Router, routing::post};
use bytes::Bytes;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http_body_util::BodyExt;
use oncekey::http::{IdempotencyLayer, Policy, Scope};
use oncekey::{Durability, Retention, Store};
use std::cell::Cell;
use std::path::Path;
use std::time::Duration;
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

fn measure(criterion: &mut Criterion, name: &str, mut router: Router, mut key: impl FnMut() -> Option<String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("it needs no thread");
    criterion.benchmark_group("http").bench_function(name, |bencher| {
        bencher.iter_batched(
            || request(key().as_deref()),
            |request| runtime.block_on(answer(&mut router, request)),
            BatchSize::SmallInput,
        );
    });
}

fn fresh_keys() -> impl FnMut() -> Option<String> {
    let next = Cell::new(0u64);
    move || Some(format!("8e03978e-40d5-43e8-bc93-{:012x}", next.replace(next.get() + 1)))
}

fn layer(criterion: &mut Criterion) {
    let memory = || Store::in_memory().expect("there is memory");
    let same = || Some("8e03978e-40d5-43e8-bc93-6894a57f9324".to_owned());
    measure(criterion, "bare", bare(), || None);
    measure(criterion, "without a key", protected(memory()), || None);
    measure(criterion, "fresh, in memory", protected(memory()), fresh_keys());
    let (_dir, store) = on_disk();
    measure(criterion, "fresh, buffered", protected(store), fresh_keys());
    measure(criterion, "replay, in memory", replaying(memory()), same);
    let (_dir, store) = on_disk();
    measure(criterion, "replay, buffered", replaying(store), same);
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

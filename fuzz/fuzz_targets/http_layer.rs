//! Arbitrary keys, bodies and stored bytes behind the HTTP layer: no panic, one run a key, and the same answer for all.
#![no_main]

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;
use oncekey::http::{Body, IdempotencyLayer, PayloadDigest, Policy, Scope, StoredAnswer};
use oncekey::{Durability, Fingerprint, Outcome, Request as Key, Store};
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, ServiceExt, service_fn};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    static STORE: RefCell<Store> = RefCell::new(store());
    static INPUTS: Cell<u64> = const { Cell::new(0) };
    static RUNS: Cell<u32> = const { Cell::new(0) };
}

fn store() -> Store {
    let builder = Store::builder().durability(Durability::Buffered).background(false);
    builder.segment_size(1 << 20).in_memory().expect("a store")
}

#[derive(Debug, arbitrary::Arbitrary)]
struct Input {
    keys: Vec<Vec<u8>>,
    content_type: Vec<u8>,
    body: Vec<u8>,
    status: u16,
    /// What is stored under the key before, if anything.
    stored: Option<Vec<u8>>,
}

fn request(input: &Input) -> Option<Request<Body>> {
    let mut request = Request::post("/orders");
    for key in &input.keys {
        request = request.header("idempotency-key", HeaderValue::from_bytes(key).ok()?);
    }
    if let Ok(value) = HeaderValue::from_bytes(&input.content_type) {
        request = request.header("content-type", value);
    }
    request.body(Body::from(input.body.clone())).ok()
}

async fn ask(
    service: impl AsyncFn(Request<Body>) -> Response<Body>,
    input: &Input,
) -> Option<(StatusCode, bool, Bytes)> {
    let response = service(request(input)?).await;
    let (status, is_replay) = (response.status(), response.headers().contains_key("idempotency-replayed"));
    Some((status, is_replay, response.into_body().collect().await.expect("a whole body").to_bytes()))
}

fn run(store: &Store, input: &Input, nth: u64) {
    // A tenant for each input, so that none finds what another left.
    let tenant = nth.to_le_bytes();
    RUNS.set(0);
    let status = StatusCode::from_u16(200 + input.status % 300).expect("a status");
    // What a client sees as the bare form is the key itself.
    if let (Some(stored), [key]) = (&input.stored, &input.keys[..]) {
        let request = Key::new(key.trim_ascii()).scope(&tenant).operation("POST /orders");
        if let Ok(Outcome::Reserved(owner)) = store.reserve(&request) {
            owner.complete(stored).expect("room for an answer");
        }
    }
    let policy = Policy::new().fingerprint(PayloadDigest::of(|_, _| Fingerprint::NONE));
    let handler = service_fn(move |request: Request<Body>| async move {
        RUNS.set(RUNS.get() + 1);
        let mut response = Response::new(request.into_body());
        *response.status_mut() = status;
        Ok::<_, Infallible>(response)
    });
    let scope = Scope::from_request(move |_| Some(tenant));
    let service = IdempotencyLayer::new(store.clone(), scope).policy(policy).layer(handler);
    let call = async |request| service.clone().oneshot(request).await.unwrap_or_else(|never| match never {});
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let Some(first) = ask(call, input).await else { return };
            let Some(second) = ask(call, input).await else { return };
            if second.1 {
                assert_eq!((first.0, &first.2), (second.0, &second.2), "an answer that changed");
                assert!(RUNS.get() <= 1, "a second run");
            }
            if let (true, Some(stored)) = (first.1, &input.stored) {
                let answer = StoredAnswer::decode(stored.clone().into()).expect("it was replayed");
                assert_eq!((answer.status, answer.body.unwrap_or_default()), (first.0, first.2));
            }
        });
    });
}

fuzz_target!(|input: Input| {
    let nth = INPUTS.replace(INPUTS.get() + 1);
    STORE.with_borrow_mut(|current| {
        if nth % 1000 == 999 {
            *current = store();
        }
        run(current, &input, nth);
    });
});

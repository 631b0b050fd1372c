//! What the service sees of its own operation.

use super::blocking;
use super::policy::Verdict;
use crate::{Error, Reservation, Result, Retention};
use bytes::Bytes;
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// A running operation, in the extensions of its request.
///
/// ```
/// use http::{Request, Response};
/// use oncekey::http::{Body, Running, Verdict};
///
/// async fn charge(request: Request<Body>) -> Result<Response<Body>, oncekey::Error> {
///     if let Some(running) = request.extensions().get::<Running>() {
///         // The bank refuses what comes with an older number than it has seen.
///         let _fence = running.fence();
///         running.set_recovery_point("sent to the bank").await?;
///         running.set_verdict(Verdict::Store);
///     }
///     Ok(Response::new(Body::from("charged")))
/// }
/// ```
#[derive(Clone)]
pub struct Running(Arc<Shared>);

struct Shared {
    /// `None` once the operation is over.
    own: Mutex<Option<Own>>,
    fence: u64,
    attempt: u32,
    recovery_point: Option<Bytes>,
    /// Whether writing to the store waits for the device.
    is_synced: bool,
}

struct Own {
    reservation: Reservation,
    verdict: Option<Verdict>,
}

impl Running {
    pub(super) fn new(reservation: Reservation, is_synced: bool) -> Self {
        Running(Arc::new(Shared {
            fence: reservation.fence(),
            attempt: reservation.attempt(),
            recovery_point: reservation.last_recovery_point().map(Bytes::copy_from_slice),
            own: Mutex::new(Some(Own { reservation, verdict: None })),
            is_synced,
        }))
    }

    /// Number of the attempt, from 1; greater only after an interruption.
    pub fn attempt(&self) -> u32 {
        self.0.attempt
    }

    /// Number of the reservation, greater than all before it: for systems downstream that refuse writes with an older one.
    pub fn fence(&self) -> u64 {
        self.0.fence
    }

    /// What the owner that vanished had left for this one.
    pub fn recovery_point(&self) -> Option<Bytes> {
        self.0.recovery_point.clone()
    }

    /// Notes how far the operation got, for the attempt that comes after a crash. When it returns that survives what the
    /// operation's [`Durability`](crate::Durability) says.
    ///
    /// # Errors
    ///
    /// As [`Reservation::recovery_point`](crate::Reservation::recovery_point); `Fenced` too once the operation is over.
    pub async fn set_recovery_point(&self, point: impl Into<Bytes>) -> Result<()> {
        let point = point.into();
        if !self.0.is_synced {
            return self.with_own(|own| own.reservation.recovery_point(&point));
        }
        let running = self.clone();
        blocking(move || running.with_own(|own| own.reservation.recovery_point(&point))).await
    }

    /// Overrides what the policy says of the answer.
    pub fn set_verdict(&self, verdict: Verdict) {
        if let Some(own) = &mut *self.0.own.lock() {
            own.verdict = Some(verdict);
        }
    }

    /// How long the answer will be kept.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if it is shorter than 1 ms; `Fenced` once the operation is over.
    pub fn set_retention(&self, retention: Retention) -> Result<()> {
        self.with_own(|own| own.reservation.set_retention(retention))
    }

    pub(super) fn verdict(&self) -> Option<Verdict> {
        self.0.own.lock().as_ref().and_then(|own| own.verdict)
    }

    pub(super) fn is_synced(&self) -> bool {
        self.0.is_synced
    }

    /// Ends the operation; what is done with the reservation decides how.
    pub(super) fn take(&self) -> Option<Reservation> {
        self.0.own.lock().take().map(|own| own.reservation)
    }

    fn with_own<T>(&self, act: impl FnOnce(&mut Own) -> Result<T>) -> Result<T> {
        match &mut *self.0.own.lock() {
            Some(own) => act(own),
            None => Err(Error::fenced(self.0.fence)),
        }
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("fence", &self.0.fence)
            .field("attempt", &self.0.attempt)
            .finish_non_exhaustive()
    }
}

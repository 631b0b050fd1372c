//! The one type of body that the layer hands on, of requests as of answers.

use super::BoxError;
use super::recording::Follower;
use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use std::any::Any;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A body of a request or an answer that went through the layer.
#[derive(Default)]
pub struct Body(Kind);

/// What comes after a body. Boxed, for there seldom is any, and bodies are moved about.
pub(super) type Trailers = Option<Box<HeaderMap>>;

#[derive(Default)]
enum Kind {
    #[default]
    Empty,
    Whole(Bytes, Trailers),
    /// Some that was read already, and what is still to come.
    Rest(Bytes, AnyBody),
    Passed(AnyBody),
    Followed(Follower),
}

type AnyBody = Pin<Box<dyn http_body::Body<Data = Bytes, Error = BoxError> + Send>>;

pin_project_lite::pin_project! {
    /// A body whose pieces and errors became those of all. It tells its length, which http-body-util's combinators don't.
    struct Erased<B> {
        #[pin]
        body: B,
    }
}

impl<B> http_body::Body for Erased<B>
where
    B: http_body::Body,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = std::task::ready!(self.project().body.poll_frame(context));
        Poll::Ready(frame.map(|frame| match frame {
            Ok(frame) => Ok(frame.map_data(|mut data| data.copy_to_bytes(data.remaining()))),
            Err(error) => Err(error.into()),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Body {
    /// Wraps any body.
    pub fn new<B>(body: B) -> Body
    where
        B: http_body::Body + Send + 'static,
        B::Error: Into<BoxError>,
    {
        if body.is_end_stream() {
            return Body::empty();
        }
        let mut body = Some(body);
        if let Some(own) = (&mut body as &mut dyn Any).downcast_mut::<Option<Body>>() {
            return own.take().unwrap_or_default();
        }
        let Some(body) = body else { return Body::empty() };
        Body(Kind::Passed(Box::pin(Erased { body })))
    }

    /// A body of nothing.
    pub fn empty() -> Body {
        Body(Kind::Empty)
    }

    /// A body with trailers behind it.
    pub fn with_trailers(body: impl Into<Bytes>, trailers: HeaderMap) -> Body {
        Body::whole(body.into(), Some(Box::new(trailers)))
    }

    pub(super) fn whole(body: Bytes, trailers: Trailers) -> Body {
        if body.is_empty() && trailers.is_none() { Body::empty() } else { Body(Kind::Whole(body, trailers)) }
    }

    /// The bytes of a body that was read as a whole.
    pub(super) fn to_bytes(&self) -> Bytes {
        match &self.0 {
            Kind::Whole(bytes, _) => bytes.clone(),
            Kind::Empty | Kind::Rest(..) | Kind::Passed(_) | Kind::Followed(_) => Bytes::new(),
        }
    }

    /// What was read of a body, and the body.
    pub(super) fn resumed(read: Bytes, rest: Body) -> Body {
        Body(Kind::Rest(read, Box::pin(rest)))
    }

    pub(super) fn followed(follower: Follower) -> Body {
        Body(Kind::Followed(follower))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Body {
        Body::whole(bytes, None)
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        Body::from(Bytes::from(bytes))
    }
}

impl From<String> for Body {
    fn from(text: String) -> Body {
        Body::from(Bytes::from(text))
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Body {
        Body::from(Bytes::from_static(text.as_bytes()))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Kind::Empty => Poll::Ready(None),
            Kind::Passed(body) => body.as_mut().poll_frame(context),
            Kind::Followed(follower) => follower.poll_frame(context),
            Kind::Whole(bytes, trailers) => {
                let data = (!bytes.is_empty()).then(|| Frame::data(std::mem::take(bytes)));
                let frame = data.or_else(|| trailers.take().map(|trailers| Frame::trailers(*trailers)));
                Poll::Ready(frame.map(Ok))
            }
            Kind::Rest(read, _) if !read.is_empty() => Poll::Ready(Some(Ok(Frame::data(std::mem::take(read))))),
            Kind::Rest(_, body) => body.as_mut().poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Empty => true,
            Kind::Whole(bytes, trailers) => bytes.is_empty() && trailers.is_none(),
            Kind::Rest(read, body) => read.is_empty() && body.is_end_stream(),
            Kind::Passed(body) => body.is_end_stream(),
            Kind::Followed(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Empty => SizeHint::with_exact(0),
            // With trailers to come, a length would end an answer of HTTP/1 before them.
            Kind::Whole(_, Some(_)) => SizeHint::default(),
            Kind::Whole(bytes, None) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Rest(read, body) => {
                let mut hint = SizeHint::new();
                hint.set_lower(body.size_hint().lower() + read.len() as u64);
                if let Some(upper) = body.size_hint().upper() {
                    hint.set_upper(upper + read.len() as u64);
                }
                hint
            }
            Kind::Passed(body) => body.size_hint(),
            Kind::Followed(follower) => follower.size_hint(),
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("size_hint", &self.size_hint()).finish_non_exhaustive()
    }
}

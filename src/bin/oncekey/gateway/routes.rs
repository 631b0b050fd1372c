//! Which policy holds for which request: the routes of the settings file.
//!
//! A route holds for its path and its methods; everything else falls to `[policy]`. Paths are compared as they are sent,
//! without decoding `%xx`.

use super::config::{Config, ScopeFrom, body_size, header};
use super::settings::{Interrupted, Keep, Preset, Rules, WhenUnavailable};
use bytesize::ByteSize;
use http::request::Parts;
use http::{HeaderName, Method, StatusCode};
use oncekey::http as layer;
use oncekey::http::{HeaderFilter, InFlight, PayloadDigest, Policy, Scope, Verdict, Verdicts};
use std::sync::Arc;

/// The policies of a gateway, looked up by path and method.
pub struct Policies {
    common: Policy,
    paths: Option<matchit::Router<Vec<Route>>>,
}

struct Route {
    methods: Vec<Method>,
    policy: Arc<Policy>,
}

impl Policies {
    /// Checks every route; messages name it.
    pub fn new(config: &Config) -> Result<Self, String> {
        if config.policy.path.is_some() || config.policy.idempotent.is_some() {
            return Err(
                "[policy] is for requests without a route: path and idempotent belong into a [[route]]".to_owned()
            );
        }
        let (common, _) =
            policy(&config.policy, &Rules::default(), config).map_err(|error| format!("[policy] {error}"))?;
        let mut by_path: Vec<(&str, Vec<Route>)> = Vec::new();
        for rules in &config.routes {
            let path = rules.path.as_deref().ok_or("a [[route]] has no path: add path = \"/v1/payments\"")?;
            if !path.starts_with('/') {
                return Err(format!("route {path:?} must begin with /"));
            }
            if let Some(odd) = path.chars().find(|&c| matches!(c, '?' | '#' | ' ') || c.is_control()) {
                return Err(format!(
                    "route {path:?} has {odd:?}, which no request's path has: write the path alone, with %xx as clients send it"
                ));
            }
            let (policy, methods) =
                policy(rules, &config.policy, config).map_err(|error| format!("route {path:?}: {error}"))?;
            let route = Route { methods, policy: Arc::new(policy) };
            match by_path.iter_mut().find(|(known, _)| *known == path) {
                None => by_path.push((path, vec![route])),
                Some((_, routes)) => {
                    if let Some(method) =
                        route.methods.iter().find(|method| routes.iter().any(|r| r.methods.contains(method)))
                    {
                        return Err(format!("route {path:?} is there twice for {method}: give each its own methods"));
                    }
                    routes.push(route);
                }
            }
        }
        let mut paths = matchit::Router::new();
        for (path, routes) in by_path {
            paths.insert(path, routes).map_err(|error| format!("route {path:?}: {error}"))?;
        }
        Ok(Policies { common, paths: (!config.routes.is_empty()).then_some(paths) })
    }

    /// The layer with these policies.
    pub fn on(self, layer: layer::IdempotencyLayer) -> layer::IdempotencyLayer {
        let layer = layer.policy(self.common);
        match self.paths {
            None => layer,
            Some(paths) => layer.route(move |parts| {
                let routes = paths.at(parts.uri.path()).ok()?.value;
                routes.iter().find(|route| route.methods.contains(&parts.method)).map(|route| Arc::clone(&route.policy))
            }),
        }
    }
}

/// The extractor of the scope that the settings name.
pub fn scope(from: &ScopeFrom) -> Scope {
    match from {
        ScopeFrom::SingleTenant => Scope::single_tenant(),
        ScopeFrom::Authorization => {
            Scope::from_request(|parts: &Parts| sole(parts, &http::header::AUTHORIZATION).map(hashed_scope))
        }
        ScopeFrom::Header(name) => {
            let name = name.clone();
            Scope::from_request(move |parts: &Parts| sole(parts, &name).map(<[u8]>::to_vec))
        }
    }
}

/// What stands for an `Authorization` value: the store never sees the credential itself.
pub fn hashed_scope(value: &[u8]) -> Vec<u8> {
    blake3::hash(value).to_hex().as_bytes().to_vec()
}

/// The value of a header that is there once: of two, it would be a guess which one the upstream believes.
fn sole<'a>(parts: &'a Parts, name: &HeaderName) -> Option<&'a [u8]> {
    let mut values = parts.headers.get_all(name).iter();
    let value = values.next().filter(|value| !value.is_empty())?;
    values.next().is_none().then(|| value.as_bytes())
}

/// The policy that rules describe over common ones, and the methods it holds for.
fn policy(own: &Rules, common: &Rules, config: &Config) -> Result<(Policy, Vec<Method>), String> {
    let rules = own.or(common);
    let methods = match &rules.methods {
        None => vec![Method::POST, Method::PATCH],
        Some(names) => names.iter().map(|name| method(name)).collect::<Result<_, _>>()?,
    };
    if methods.is_empty() {
        return Err("methods = [] holds for no request: name some, or say idempotent = false".to_owned());
    }
    if own.idempotent == Some(false) {
        let passing = Rules {
            path: own.path.clone(),
            methods: own.methods.clone(),
            idempotent: own.idempotent,
            ..Rules::default()
        };
        if *own != passing {
            return Err("idempotent = false passes everything on: it goes with path and methods only".to_owned());
        }
        return Ok((Policy::new().methods([]), methods));
    }
    let max_body = body_size("max_body", rules.max_body, config.limits.max_body)?;
    if max_body > config.limits.max_buffered {
        let (max_body, max_buffered) = (ByteSize::b(max_body as u64), ByteSize::b(config.limits.max_buffered as u64));
        return Err(format!("max_body = {max_body} is more than max_buffered = {max_buffered}, which it has to fit"));
    }
    let mut policy = Policy::new()
        .header(config.key_header.clone())
        .methods(methods.clone())
        .required(rules.required.unwrap_or(false))
        .max_request_body(max_body)
        .request_body_timeout(config.timeouts.body)
        .in_flight(match (rules.in_flight, rules.wait) {
            (_, None) => InFlight::Refuse,
            (None, Some(wait)) => InFlight::Wait(wait.0),
            (Some(_), Some(_)) => return Err("in_flight = \"refuse\" and wait exclude each other".to_owned()),
        })
        .verdicts(verdicts(rules.preset.unwrap_or(Preset::Ietf)))
        .interrupted(match rules.interrupted.unwrap_or(Interrupted::Refuse) {
            Interrupted::Refuse => layer::Interrupted::Refuse,
            Interrupted::Rerun => layer::Interrupted::Rerun,
        })
        .max_answer(body_size("max_answer", rules.max_answer, config.limits.max_answer)?)
        .when_unavailable(match rules.when_unavailable.unwrap_or(WhenUnavailable::Refuse) {
            WhenUnavailable::Refuse => layer::WhenUnavailable::Refuse,
            WhenUnavailable::Pass => layer::WhenUnavailable::Pass,
        });
    // Else, as lease and durability, it is the store's, which was opened with the settings.
    if let Some(Keep(retention)) = rules.retention {
        policy = policy.retention(retention);
    }
    if let Some(pointers) = &rules.fingerprint {
        if pointers.is_empty() {
            return Err("fingerprint = [] compares nothing: leave it out to compare the whole body".to_owned());
        }
        let digest = PayloadDigest::json_pointers(pointers.iter().map(String::as_str))
            .map_err(|error| format!("fingerprint: {error}"))?;
        policy = policy.fingerprint(digest);
    }
    match (&rules.store_headers, &rules.deny_headers) {
        (None, None) => {}
        (Some(names), None) => policy = policy.stored_headers(HeaderFilter::allow(headers("store_headers", names)?)),
        (None, Some(names)) => policy = policy.stored_headers(HeaderFilter::deny(headers("deny_headers", names)?)),
        (Some(_), Some(_)) => return Err("store_headers and deny_headers exclude each other".to_owned()),
    }
    Ok((policy, methods))
}

/// A preset, but for the answers that leave it open whether the operation was done: another gateway's 502 and 504.
fn verdicts(preset: Preset) -> Verdicts {
    let preset = match preset {
        Preset::Ietf => Verdicts::ietf(),
        Preset::Stripe => Verdicts::stripe(),
    };
    Verdicts::of(move |answer| match answer.status {
        StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => Verdict::Unknown,
        _ => preset.verdict(answer),
    })
}

fn method(name: &str) -> Result<Method, String> {
    if !name.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Err(format!("methods: {name:?} must be in capitals, such as POST"));
    }
    Method::from_bytes(name.as_bytes()).map_err(|error| format!("methods: {name:?}: {error}"))
}

fn headers(setting: &str, names: &[String]) -> Result<Vec<HeaderName>, String> {
    names.iter().map(|name| header(setting, name)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::config::tests::config;
    use super::*;

    fn refusal(file: &str) -> String {
        config(file).err().unwrap_or_else(|| panic!("{file} is accepted"))
    }

    #[test]
    fn a_route_that_contradicts_itself_is_refused_by_its_path() {
        for (route, says) in [
            ("path = \"v1\"", "begin with /"),
            ("required = true", "path"),
            ("path = \"/a?b=1\"", "'?'"),
            ("path = \"/a#b\"", "'#'"),
            ("path = \"/a b\"", "' '"),
            ("path = \"/a\\tb\"", "'\\t'"),
            ("path = \"/a\\u007f\"", "'\\u{7f}'"),
            ("path = \"/a\"\nmethods = []", "methods"),
            ("path = \"/a\"\nmethods = [\"post\"]", "capitals"),
            ("path = \"/a\"\nin_flight = \"refuse\"\nwait = \"1s\"", "wait"),
            ("path = \"/a\"\nidempotent = false\nrequired = true", "idempotent"),
            ("path = \"/a\"\nfingerprint = []", "fingerprint"),
            ("path = \"/a\"\nfingerprint = [\"amount\"]", "fingerprint"),
            ("path = \"/a\"\nstore_headers = [\"etag\"]\ndeny_headers = [\"x\"]", "exclude"),
            ("path = \"/a/{b\"", "/a/{b"),
            ("path = \"/a\"\nmax_body = \"1GiB\"", "max_body"),
        ] {
            let message = refusal(&format!("[[route]]\n{route}\n"));
            assert!(message.contains(says), "{route}: {message}");
        }
        assert!(refusal("[policy]\npath = \"/a\"").contains("[policy]"));
    }

    #[test]
    fn one_path_may_have_routes_of_different_methods() {
        let put = "[[route]]\npath = \"/a\"\nmethods = [\"PUT\"]\n";
        assert!(config(&format!("{put}[[route]]\npath = \"/a\"\n")).is_ok());
        assert!(refusal(&format!("{put}{put}")).contains("twice for PUT"));
    }

    #[test]
    fn answers_that_tell_nothing_of_the_operation_leave_it_unknown() {
        let verdict = |preset, status: u16| {
            let (parts, ()) = http::Response::builder().status(status).body(()).unwrap().into_parts();
            verdicts(preset).verdict(&parts)
        };
        for preset in [Preset::Ietf, Preset::Stripe] {
            assert_eq!(verdict(preset, 502), Verdict::Unknown);
            assert_eq!(verdict(preset, 504), Verdict::Unknown);
            assert_eq!(verdict(preset, 201), Verdict::Store);
        }
        assert_eq!(verdict(Preset::Ietf, 503), Verdict::Release);
    }

    #[test]
    fn a_scope_is_never_guessed_from_two_values() {
        let parts = |values: &[&str]| {
            let request =
                values.iter().fold(http::Request::builder(), |request, value| request.header("x-tenant", *value));
            request.body(()).unwrap().into_parts().0
        };
        let name = HeaderName::from_static("x-tenant");
        assert_eq!(sole(&parts(&["a"]), &name), Some(&b"a"[..]));
        for values in [&[][..], &[""], &["a", "a"], &["a", "b"]] {
            assert_eq!(sole(&parts(values), &name), None, "{values:?}");
        }
    }
}

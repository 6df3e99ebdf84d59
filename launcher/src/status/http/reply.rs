//! What a request gets for a reply. Pure.

use crate::status::{Snapshot, metrics};

/// Request line and headers together.
const MAX_HEAD: usize = 8 << 10;
const MAX_HEADERS: usize = 64;
const TOO_LONG: &str = "the request line and headers exceed 8 KiB";

/// The reply to the request that begins with `head`, all that came so far; `None` while that is not complete.
pub fn reply(head: &[u8], snapshot: &Snapshot) -> Option<Vec<u8>> {
    match parse(head) {
        Ok(None) if head.len() < MAX_HEAD => None,
        Ok(None) => Some(Refusal::bad(TOO_LONG).answer()),
        Ok(Some(page)) => Some(answer(page, snapshot)),
        Err(refusal) => Some(refusal.answer()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Index,
    Status,
    Metrics,
}

#[derive(Debug, PartialEq)]
struct Refusal {
    status: &'static str,
    why: &'static str,
}

impl Refusal {
    fn bad(why: &'static str) -> Refusal {
        let status = "400 Bad Request";
        Refusal { status, why }
    }

    fn answer(&self) -> Vec<u8> {
        let body = format!("{}: {}\n", self.status, self.why);
        respond(self.status, "text/plain; charset=utf-8", body.as_bytes())
    }
}

/// Which page `head` asks for; `None` while it is not complete.
fn parse(head: &[u8]) -> Result<Option<Page>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return Ok(None),
        Ok(httparse::Status::Complete(length)) if length > MAX_HEAD => {
            return Err(Refusal::bad(TOO_LONG));
        }
        Ok(httparse::Status::Complete(_)) => {}
        Err(_) => return Err(Refusal::bad("this is not an HTTP request")),
    }
    let values = |name: &'static str| {
        let headers = request.headers.iter();
        headers
            .filter(move |h| h.name.eq_ignore_ascii_case(name))
            .map(|h| h.value)
    };
    // A page of some other site may make a browser ask under the site's own name (DNS rebinding).
    let mut hosts = values("host");
    if !matches!((hosts.next(), hosts.next()), (Some(host), None) if is_loopback(host)) {
        return Err(Refusal::bad(
            "the Host header has to be localhost, 127.0.0.1 or [::1]",
        ));
    }
    if values("transfer-encoding").next().is_some() || values("content-length").any(|v| v != b"0") {
        return Err(Refusal::bad("a request has no body here"));
    }
    let path = request.path.unwrap_or_default();
    let page = match path.split_once('?').map_or(path, |(path, _)| path) {
        "/" => Page::Index,
        "/status.json" => Page::Status,
        "/metrics" => Page::Metrics,
        _ => {
            return Err(Refusal {
                status: "404 Not Found",
                why: "there are / and /status.json and /metrics",
            });
        }
    };
    if request.method != Some("GET") {
        return Err(Refusal {
            status: "405 Method Not Allowed",
            why: "only GET is allowed",
        });
    }
    Ok(Some(page))
}

fn is_loopback(host: &[u8]) -> bool {
    ["localhost", "127.0.0.1", "[::1]"].iter().any(|name| {
        let Some((own, port)) = host.split_at_checked(name.len()) else {
            return false;
        };
        let digits = |port: &[u8]| port.len() <= 5 && port.iter().all(u8::is_ascii_digit);
        own.eq_ignore_ascii_case(name.as_bytes())
            && (port.is_empty() || port.strip_prefix(b":").is_some_and(digits))
    })
}

fn answer(page: Page, snapshot: &Snapshot) -> Vec<u8> {
    const OK: &str = "200 OK";
    match page {
        Page::Index => {
            let text = format!(
                "tsm-launch: {}\n\n/status.json  the whole status\n/metrics      for Prometheus\n",
                snapshot.run_id
            );
            respond(OK, "text/plain; charset=utf-8", text.as_bytes())
        }
        Page::Status => match serde_json::to_vec(snapshot) {
            Ok(body) => respond(OK, "application/json", &body),
            // A path that is no UTF-8.
            Err(e) => {
                let body = format!("the status has no form as JSON: {e}\n");
                let kind = "text/plain; charset=utf-8";
                respond("500 Internal Server Error", kind, body.as_bytes())
            }
        },
        Page::Metrics => respond(
            OK,
            metrics::CONTENT_TYPE,
            metrics::render(snapshot).as_bytes(),
        ),
    }
}

fn respond(status: &str, kind: &str, body: &[u8]) -> Vec<u8> {
    let allow = if status.starts_with("405") {
        "Allow: GET\r\n"
    } else {
        ""
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{allow}\
         Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: localhost:80\r\n\r\n")
    }

    fn status(head: &str) -> &'static str {
        match parse(head.as_bytes()) {
            Ok(Some(_)) => "200 OK",
            Ok(None) => "incomplete",
            Err(refusal) => refusal.status,
        }
    }

    #[test]
    fn three_pages_and_nothing_else() {
        assert_eq!(parse(get("/").as_bytes()), Ok(Some(Page::Index)));
        assert_eq!(
            parse(get("/status.json").as_bytes()),
            Ok(Some(Page::Status))
        );
        assert_eq!(
            parse(get("/metrics?a=b").as_bytes()),
            Ok(Some(Page::Metrics))
        );
        for path in [
            "/metrics/",
            "//",
            "/../etc/passwd",
            "http://localhost/",
            "*",
        ] {
            assert_eq!(status(&get(path)), "404 Not Found", "{path}");
        }
        for method in ["POST", "HEAD", "DELETE", "OPTIONS"] {
            let head = get("/metrics").replacen("GET", method, 1);
            assert_eq!(status(&head), "405 Method Not Allowed");
        }
        let answer = Refusal {
            status: "405 Method Not Allowed",
            why: "",
        };
        assert!(String::from_utf8_lossy(&answer.answer()).contains("\r\nAllow: GET\r\n"));
    }

    #[test]
    fn a_browser_on_another_site_s_page_is_refused() {
        for host in [
            "localhost",
            "LOCALHOST:9",
            "127.0.0.1",
            "127.0.0.1:65535",
            "[::1]:80",
        ] {
            let head = get("/").replace("localhost:80", host);
            assert_eq!(status(&head), "200 OK", "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "localhost:80.evil.example",
            "127.0.0.1.nip.io",
            "127.0.0.2",
            "",
            "::1",
            "localhost\r\nHost: localhost",
        ] {
            let head = get("/").replace("localhost:80", host);
            assert_eq!(status(&head), "400 Bad Request", "{host}");
        }
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "400 Bad Request");
    }

    #[test]
    fn what_is_no_plain_request_is_refused() {
        for head in [
            "GET / HTTP/3.7\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01\x00",
            "SSH-2.0-OpenSSH_9.6\r\n",
            "GET /\r\n\r\n",
            &get("/").replace("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\nhello"),
            &get("/").replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n"),
            &get("/").replace("\r\n\r\n", &"\r\na: b".repeat(MAX_HEADERS + 1)),
        ] {
            assert_eq!(status(head), "400 Bad Request", "{head}");
        }
        let long = get(&format!("/?{}", "x".repeat(MAX_HEAD)));
        assert_eq!(status(&long), "400 Bad Request");
        assert_eq!(status("GET / HTTP/1.1\r\nHost: loc"), "incomplete");
    }

    #[test]
    fn a_request_without_end_is_refused() {
        let reply = |len: usize| {
            let head = "GET / HTTP/1.1\r\nX: ".to_string() + &"x".repeat(MAX_HEAD);
            reply(&head.as_bytes()[..len], &Snapshot::default())
        };
        assert_eq!(reply(MAX_HEAD - 1), None);
        let refused = reply(MAX_HEAD).unwrap();
        assert!(refused.starts_with(b"HTTP/1.1 400 "));
    }

    proptest! {
        #[test]
        fn no_garbage_panics(head in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&head);
        }

        /// As a stream brings it: what a beginning says, the whole does not take back.
        #[test]
        fn a_request_may_come_in_pieces(method in "[A-Z]{1,7}", path in "/[a-z.]{0,12}", host in "[a-z0-9.:]{0,12}", end in "\\PC{0,20}") {
            let head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nX: {end}\r\n\r\n");
            let whole = parse(head.as_bytes());
            for cut in 0..head.len() {
                let part = parse(&head.as_bytes()[..cut]);
                prop_assert!(part == Ok(None) || part.is_err() && part == whole, "{cut}: {part:?}");
            }
        }
    }
}

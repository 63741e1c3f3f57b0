//! Requests over HTTP that are refused, and those that fail.

use std::time::Duration;

use serde_json::{Value, json};

use super::tests::{Answer, CHAT, TEXT, chat, get, post, post_text, says_plainly, send};
use crate::core::{RequestError, SubmitError, Update};
use crate::front::door::Entrance;
use crate::front::fixtures::{Play, demo_model, start, start_behind};

#[tokio::test]
async fn failures_have_the_status_that_clients_understand() {
    let wait = Duration::from_millis(1500);
    let too_long = SubmitError::PromptTooLong { tokens: 9, limit: 8 };
    let refused = [
        (SubmitError::NoNodes("demo".into()), 503, "unavailable", Some("true")),
        (SubmitError::ShuttingDown, 503, "unavailable", Some("true")),
        (SubmitError::Overloaded { retry_after: wait }, 529, "overloaded", Some("true")),
        (SubmitError::TooLate { retry_after: wait }, 529, "overloaded", Some("true")),
        (too_long, 400, "context_length_exceeded", None),
    ];
    for (refusal, status, code, retry) in refused {
        let overloaded = status == 529;
        let played = start(move |_| Play::Refuse(refusal.clone())).await;
        for body in [chat(json!({})), chat(json!({"stream": true}))] {
            let answer = post(&played, CHAT, &body).await;
            assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)));
            assert_eq!(answer.header("x-should-retry"), retry);
            assert_eq!(answer.header("retry-after").is_some(), retry.is_some());
            if overloaded {
                let waits = (answer.header("retry-after"), answer.header("retry-after-ms"));
                assert_eq!(waits, (Some("2"), Some("1500")));
            }
        }
    }
    let failed = [
        (RequestError::DeadlineExceeded, 504, "deadline_exceeded", Some("false")),
        (RequestError::Cancelled, 499, "cancelled", None),
        (
            RequestError::NoNodes { waited: Duration::from_secs(5) },
            503,
            "unavailable",
            Some("true"),
        ),
        (
            RequestError::Exhausted { attempts: 3, reason: "x".into() },
            503,
            "unavailable",
            Some("false"),
        ),
        (RequestError::Rejected("too few blocks".into()), 400, "cannot_be_served", None),
    ];
    for (failure, status, code, retry) in failed {
        let played = start(move |_| Play::Accept(vec![Update::Failed(failure.clone())])).await;
        for body in [chat(json!({})), chat(json!({"stream": true}))] {
            let answer = post(&played, CHAT, &body).await;
            assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)));
            assert_eq!(answer.header("x-should-retry"), retry, "{code}");
        }
    }
}

#[tokio::test]
async fn an_overload_has_the_status_that_is_configured() {
    for status in [503, 429] {
        let entrance = Entrance::open().with_overload_status(status.try_into().unwrap());
        let refuse =
            |_: &_| Play::Refuse(SubmitError::Overloaded { retry_after: Duration::from_secs(1) });
        let played = start_behind(entrance, &demo_model(), &["demo"], Vec::new(), refuse).await;
        for body in [chat(json!({})), chat(json!({"stream": true}))] {
            let answer = post(&played, CHAT, &body).await;
            let error = &answer.json()["error"];
            assert_eq!((answer.status, &error["code"]), (status, &json!("overloaded")));
            assert_eq!(error["type"], "overloaded_error", "the body tells it from other errors");
            let said = (answer.header("retry-after"), answer.header("x-should-retry"));
            assert_eq!(said, (Some("1"), Some("true")));
        }
        let unknown = post(&played, CHAT, &chat(json!({"model": "gpt"}))).await;
        assert_eq!(unknown.status, 404, "others stay as they are");
    }
}

#[tokio::test]
async fn a_failure_after_the_first_token_ends_the_stream_with_an_error() {
    let failing = |_: &_| {
        let mut updates = says_plainly("Hello you");
        *updates.last_mut().unwrap() =
            Update::Failed(RequestError::NoNodes { waited: Duration::from_secs(5) });
        Play::Accept(updates)
    };
    let played = start(failing).await;
    for (path, body) in [
        (CHAT, chat(json!({"stream": true, "stream_options": {"include_usage": true}}))),
        (TEXT, json!({"prompt": "Hi", "stream": true})),
    ] {
        let events = post(&played, path, &body).await.events();
        assert!(events.len() > 2 && events.iter().all(|event| event != "[DONE]"), "{events:?}");
        let error = &events.last().unwrap()["error"];
        assert_eq!(
            (&error["code"], &error["type"]),
            (&json!("unavailable"), &json!("server_error"))
        );
    }
    // The client would have to pay twice.
    let answer = post(&played, CHAT, &chat(json!({}))).await;
    assert_eq!((answer.status, answer.header("x-should-retry")), (503, Some("false")));
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let played = start(|_| panic!("nothing of this reaches the core")).await;
    let error = |answer: &Answer| {
        let json = answer.json();
        (answer.status, json["error"]["code"].as_str().unwrap().to_owned())
    };
    let head = |path: &str, more: &str| {
        format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n\r\n")
    };
    let form = "content-type: application/x-www-form-urlencoded\r\ncontent-length: 2";
    let answer = send(&played, &(head(CHAT, form) + "{}")).await;
    assert_eq!(error(&answer), (415, "unsupported_media_type".into()));
    let long = "content-type: application/json\r\ncontent-length: 16777217";
    let answer = send(&played, &head(CHAT, long)).await;
    assert_eq!(error(&answer), (413, "request_too_large".into()));
    let answer = post_text(&played, CHAT, "{\"messages\": [}").await;
    assert_eq!(error(&answer), (400, "invalid_json".into()));
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("line 1 column 15"));
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
    let answer = get(&played, CHAT).await;
    assert_eq!(error(&answer), (405, "method_not_allowed".into()));
    assert_eq!(answer.header("allow"), Some("POST"));
    let answer = get(&played, "/v2/anything").await;
    assert_eq!(error(&answer), (404, "not_found".into()));
    assert!(answer.header("x-request-id").is_some_and(|id| id.starts_with("req_")));
    let answer = post(&played, CHAT, &chat(json!({"model": "gpt"}))).await;
    assert_eq!(error(&answer), (404, "model_not_found".into()));
    let answer = post(&played, CHAT, &chat(json!({"temprature": 1}))).await;
    assert_eq!(error(&answer), (400, "unsupported_parameter".into()));
    assert_eq!(answer.json()["error"]["param"], "temprature");
}

#[tokio::test]
async fn wrong_values_name_the_parameter_and_a_good_request_is_served_after_them() {
    let played = start(|_| Play::Accept(says_plainly("ok"))).await;
    type Kind = fn(u32) -> (&'static str, Value);
    let kinds: [Kind; 10] = [
        |i| ("temperature", json!(2.0 + f64::from(i + 1) / 10.0)),
        |i| ("top_p", json!(-f64::from(i))),
        |i| ("max_tokens", json!(-1 - i64::from(i))),
        |i| ("stop", json!(vec!["x"; 17 + i as usize])),
        |i| ("n", json!(17 + i)),
        |i| ("logit_bias", json!({ format!("{}", 2048 + i): 1 })),
        |i| ("stop_token_ids", json!([2048 + i])),
        |i| ("seed", json!(format!("{i}"))),
        |i| ("messages", json!(vec![i; 1 + i as usize])),
        |i| ("min_p", json!([i])),
    ];
    for kind in kinds {
        for i in 0..100 {
            let (param, value) = kind(i);
            let answer = post(&played, CHAT, &chat(json!({ param: value }))).await;
            let error = &answer.json()["error"];
            assert_eq!(answer.status, 400, "{param}: {error}");
            let named = error["param"].as_str().unwrap();
            assert!(named.starts_with(param), "{param}: {error}");
            assert!(error["message"].as_str().unwrap().contains(param), "{param}: {error}");
        }
        assert_eq!(post(&played, CHAT, &chat(json!({}))).await.status, 200);
    }
}

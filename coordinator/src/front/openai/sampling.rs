//! Parameters that every endpoint which generates text takes.

use baton_proto::wire::v1::{GenerateRequest, Sampling, StructuredOutput};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, token_id};
use crate::front::prepare::MAX_CHOICES;
use crate::front::structured::json as structured;

/// Most alternatives per token.
pub(crate) const MAX_LOGPROBS: u32 = baton_proto::sampling::MAX_LOGPROBS;

/// Labels that clients put on requests; they mean nothing to the answer.
pub(super) const LABELS: [&str; 4] = ["user", "metadata", "safety_identifier", "prompt_cache_key"];

/// How the client wants its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Reply {
    pub(crate) stream: bool,
    /// The stream ends with what was used.
    pub(crate) include_usage: bool,
    /// Every part of the stream says it.
    pub(crate) continuous_usage: bool,
    pub(crate) return_token_ids: bool,
}

/// A request without its prompt, and how to answer it.
pub(crate) fn take(fields: &mut Fields) -> Result<(GenerateRequest, Reply), ApiError> {
    let request = GenerateRequest {
        model: fields.string("model")?.unwrap_or_default(),
        sampling: Some(sampling(fields)?),
        deadline_ms: fields.count("deadline_ms", 1, u32::MAX)?,
        cache_salt: cache_salt(fields)?,
        n: fields.count("n", 1, MAX_CHOICES)?,
        priority: priority(fields)?,
        tenant: fields.string("tenant")?.unwrap_or_default(),
        structured_output: structured_output(fields)?,
        ..GenerateRequest::default()
    };
    for label in LABELS {
        fields.take(label);
    }
    fields.only("service_tier", &[json!("auto"), json!("default")])?;
    fields.only("store", &[json!(false)])?;
    fields.only("use_beam_search", &[json!(false)])?;
    fields.only("best_of", &[json!(request.n.unwrap_or(1))])?;
    fields.only("spaces_between_special_tokens", &[json!(true)])?;
    Ok((request, reply(fields)?))
}

fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    Ok(Sampling {
        temperature: fields.f32("temperature")?,
        top_k: top_k(fields)?,
        top_p: fields.f32("top_p")?,
        min_p: fields.f32("min_p")?,
        repetition_penalty: fields.f32("repetition_penalty")?,
        presence_penalty: fields.f32("presence_penalty")?,
        frequency_penalty: fields.f32("frequency_penalty")?,
        logit_bias: logit_bias(fields)?,
        seed: seed(fields)?,
        min_tokens: fields.count("min_tokens", 0, u32::MAX)?,
        ignore_eos: fields.bool("ignore_eos")?,
        stop: stop(fields)?,
        stop_token_ids: fields.token_ids("stop_token_ids")?,
        skip_special_tokens: fields.bool("skip_special_tokens")?,
        include_stop_string: fields.bool("include_stop_str_in_output")?,
        ..Sampling::default()
    })
}

/// -1 and 0 keep all tokens.
fn top_k(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let Some(number) = fields.i64("top_k")? else {
        return Ok(None);
    };
    let count = u32::try_from(number.max(0)).ok().filter(|_| number >= -1);
    count.map(Some).ok_or_else(|| ApiError::value("top_k", number, "-1, 0 or a number of tokens"))
}

/// -1 draws one, as no seed does.
fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else {
        return Ok(None);
    };
    if value == json!(-1) {
        return Ok(None);
    }
    let number = value.as_u64().or_else(|| value.as_i64().map(|number| number as u64));
    number.map(Some).ok_or_else(|| ApiError::value("seed", &value, "a whole number of 64 bits"))
}

/// Token ids are keys, and so strings.
fn logit_bias(fields: &mut Fields) -> Result<std::collections::HashMap<u32, f32>, ApiError> {
    let wrong = |what: String| ApiError::invalid("logit_bias", format!("logit_bias {what}"));
    let entries = match fields.take("logit_bias") {
        None => return Ok(std::collections::HashMap::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(ApiError::value("logit_bias", other, "an object")),
    };
    let entry = |(key, bias): (String, Value)| {
        let id = key.parse().map_err(|_| wrong(format!("has {key:.40?}, no token id")))?;
        let number = bias.as_f64().ok_or_else(|| wrong(format!("of {id} is no number")))?;
        Ok((id, number as f32))
    };
    entries.into_iter().map(entry).collect()
}

/// One string or several.
fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let wrong = |value: &Value| ApiError::value("stop", value, "a string or a list of strings");
    match fields.take("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one]),
        Some(Value::Array(several)) => {
            let text = |value: &Value| value.as_str().map(str::to_owned).ok_or(wrong(value));
            several.iter().map(text).collect()
        }
        Some(other) => Err(wrong(&other)),
    }
}

/// What the text has to be, by OpenAI's name for it or by vLLM's newer or older ones.
fn structured_output(fields: &mut Fields) -> Result<Option<StructuredOutput>, ApiError> {
    let format = fields.take("response_format");
    let format = format.map(|format| structured::response_format(&format)).transpose()?;
    let mut wanted: Vec<_> = format.flatten().into_iter().collect();
    let newer = fields.take("structured_outputs");
    wanted.extend(newer.map(|newer| structured::structured_outputs(&newer)).transpose()?);
    for key in ["json", "regex", "choice", "grammar"] {
        let older = fields.take(&format!("guided_{key}"));
        let older = older.map(|older| structured::structured_outputs(&json!({ key: older })));
        wanted.extend(older.transpose()?);
    }
    if wanted.len() > 1 {
        let what = "response_format, structured_outputs and guided_* say twice what the text is";
        return Err(ApiError::invalid("structured_outputs", what));
    }
    Ok(wanted.pop())
}

pub(super) fn cache_salt(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    match fields.string("cache_salt")? {
        Some(salt) if salt.is_empty() => {
            Err(ApiError::invalid("cache_salt", "cache_salt is empty"))
        }
        salt => Ok(salt),
    }
}

/// A class by name or, as in vLLM, a number: the lower, the earlier.
pub(super) fn priority(fields: &mut Fields) -> Result<String, ApiError> {
    match fields.take("priority") {
        None => Ok(String::new()),
        Some(Value::String(class)) => Ok(class),
        Some(value) => match value.as_i64() {
            Some(..0) => Ok("interactive".to_owned()),
            Some(0) => Ok("standard".to_owned()),
            Some(1..) => Ok("batch".to_owned()),
            None => {
                let limit = "a whole number, \"interactive\", \"standard\" or \"batch\"";
                Err(ApiError::value("priority", value, limit))
            }
        },
    }
}

fn reply(fields: &mut Fields) -> Result<Reply, ApiError> {
    let mut reply = Reply {
        stream: fields.bool("stream")?.unwrap_or(false),
        return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
        ..Reply::default()
    };
    if let Some(mut options) = fields.object("stream_options")? {
        if !reply.stream {
            let what = "stream_options are only for stream = true";
            return Err(ApiError::invalid("stream_options", what));
        }
        reply.include_usage = options.bool("include_usage")?.unwrap_or(false);
        let continuous = options.bool("continuous_usage_stats")?.unwrap_or(false);
        reply.continuous_usage = continuous && reply.include_usage;
        options.only("include_obfuscation", &[json!(false)])?;
        options.finish()?;
    }
    Ok(reply)
}

/// `max_tokens` or, by its newer name, `max_completion_tokens`.
pub(crate) fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let older = fields.count("max_tokens", 1, u32::MAX)?;
    let newer = fields.count("max_completion_tokens", 1, u32::MAX)?;
    if let (Some(older), Some(newer)) = (older, newer)
        && older != newer
    {
        let limit = format!("the same as max_completion_tokens ({newer}), or absent");
        return Err(ApiError::value("max_tokens", older, &limit));
    }
    Ok(newer.or(older))
}

/// A list of token ids, the parameter `name`.
pub(crate) fn token_ids(name: &str, list: &[Value]) -> Result<Vec<u32>, ApiError> {
    list.iter().map(|id| token_id(name, id)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<(GenerateRequest, Reply), ApiError> {
        let mut fields = Fields::new("", body)?;
        let taken = take(&mut fields)?;
        fields.finish()?;
        Ok(taken)
    }

    fn sampled(body: Value) -> Sampling {
        read(body).unwrap().0.sampling.unwrap()
    }

    #[test]
    fn every_parameter_arrives() {
        let (request, reply) = read(json!({
            "model": "demo", "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.1,
            "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.2,
            "logit_bias": {"7": -100, "9": 1.5}, "seed": 11, "stop": ["a", "b"],
            "stop_token_ids": [3], "ignore_eos": true, "min_tokens": 2,
            "skip_special_tokens": false, "include_stop_str_in_output": true,
            "cache_salt": "s", "priority": -3, "tenant": "t", "deadline_ms": 100,
            "stream": true, "return_token_ids": true, "user": "u", "metadata": {"a": "b"},
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        }))
        .unwrap();
        let expected = Sampling {
            temperature: Some(0.5),
            top_p: Some(0.9),
            top_k: Some(20),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(0.2),
            frequency_penalty: Some(-0.2),
            logit_bias: [(7, -100.0), (9, 1.5)].into(),
            seed: Some(11),
            stop: vec!["a".into(), "b".into()],
            stop_token_ids: vec![3],
            ignore_eos: Some(true),
            min_tokens: Some(2),
            skip_special_tokens: Some(false),
            include_stop_string: Some(true),
            ..Sampling::default()
        };
        assert_eq!(request.sampling, Some(expected));
        assert_eq!((request.model.as_str(), request.n), ("demo", Some(2)));
        assert_eq!((request.cache_salt.as_deref(), request.tenant.as_str()), (Some("s"), "t"));
        assert_eq!((request.priority.as_str(), request.deadline_ms), ("interactive", Some(100)));
        let all = Reply {
            stream: true,
            include_usage: true,
            continuous_usage: true,
            return_token_ids: true,
        };
        assert_eq!(reply, all);
    }

    #[test]
    fn nothing_said_is_nothing_set() {
        let (request, reply) = read(json!({"temperature": null, "stream_options": null})).unwrap();
        let nothing =
            GenerateRequest { sampling: Some(Sampling::default()), ..GenerateRequest::default() };
        assert_eq!((request, reply), (nothing, Reply::default()));
    }

    #[test]
    fn other_spellings_mean_the_same() {
        assert_eq!(sampled(json!({"top_k": -1})).top_k, Some(0));
        assert_eq!(sampled(json!({"seed": -1})).seed, None);
        assert_eq!(sampled(json!({"seed": -2})).seed, Some(u64::MAX - 1));
        assert_eq!(sampled(json!({"seed": u64::MAX})).seed, Some(u64::MAX));
        assert_eq!(sampled(json!({"stop": "x"})).stop, ["x"]);
        for (priority, class) in [(json!(0), "standard"), (json!(7), "batch"), (json!("x"), "x")] {
            assert_eq!(read(json!({"priority": priority})).unwrap().0.priority, class);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"top_k": -2}), "top_k"),
            (json!({"top_k": 1.5}), "top_k"),
            (json!({"seed": 0.5}), "seed"),
            (json!({"stop": [1]}), "stop"),
            (json!({"stop": {}}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": "x"}}), "logit_bias"),
            (json!({"logit_bias": [1]}), "logit_bias"),
            (json!({"n": 0}), "n"),
            (json!({"n": 17}), "n"),
            (json!({"priority": 1.5}), "priority"),
            (json!({"cache_salt": ""}), "cache_salt"),
            (json!({"best_of": 2}), "best_of"),
            (json!({"stream_options": {}}), "stream_options"),
            (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
            (json!({"deadline_ms": 0}), "deadline_ms"),
            (json!({"store": true}), "store"),
            (json!({"temprature": 1}), "temprature"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
            assert!(error.message.contains(param), "{}", error.message);
        }
    }

    #[test]
    fn what_the_text_has_to_be_is_said_once() {
        let wanted = |body: Value| read(body).map(|(request, _)| request.structured_output);
        let choice = wanted(json!({"guided_choice": ["a"]})).unwrap();
        assert!(choice.is_some());
        assert_eq!(wanted(json!({"structured_outputs": {"choice": ["a"]}})).unwrap(), choice);
        assert_eq!(wanted(json!({"response_format": {"type": "text"}})).unwrap(), None);
        let twice = json!({"guided_regex": "a", "response_format": {"type": "json_object"}});
        let error = wanted(twice).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("structured_outputs"));
    }

    #[test]
    fn two_names_for_one_limit_must_agree() {
        let read = |body| max_tokens(&mut Fields::new("", body).unwrap());
        assert_eq!(read(json!({"max_tokens": 3})).unwrap(), Some(3));
        assert_eq!(read(json!({"max_completion_tokens": 3, "max_tokens": 3})).unwrap(), Some(3));
        assert!(read(json!({"max_completion_tokens": 3, "max_tokens": 4})).is_err());
        assert!(read(json!({"max_tokens": 0})).is_err());
    }
}

//! The parameters of a request. Each is taken by its name and type, and what nobody took is refused
//! at the end: a parameter is never ignored.

use serde_json::{Map, Value};

use super::error::ApiError;

/// A JSON object of which parameters are taken. A `null` is as good as nothing.
#[derive(Debug)]
pub(crate) struct Fields {
    /// In front of its parameters' names: empty, or as `stream_options.`.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The object `value`, which is the parameter `name`, or the whole body if that is empty.
    pub(crate) fn new(name: &str, value: Value) -> Result<Self, ApiError> {
        let Value::Object(mut map) = value else {
            let name = if name.is_empty() { "the body" } else { name };
            return Err(ApiError::value(name, value, "an object"));
        };
        map.retain(|_, value| !value.is_null());
        let prefix = if name.is_empty() { String::new() } else { format!("{name}.") };
        Ok(Self { prefix, map })
    }

    /// The whole name of a parameter.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Takes a parameter of any type.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key)
    }

    /// A parameter that is not taken yet.
    pub(crate) fn peek(&self, key: &str) -> Option<&Value> {
        self.map.get(key)
    }

    fn typed<T>(
        &mut self,
        key: &str,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        let wrong = || ApiError::value(&self.name(key), &value, wanted);
        read(&value).map(Some).ok_or_else(wrong)
    }

    pub(crate) fn bool(&mut self, key: &str) -> Result<Option<bool>, ApiError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn f32(&mut self, key: &str) -> Result<Option<f32>, ApiError> {
        self.typed(key, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    pub(crate) fn i64(&mut self, key: &str) -> Result<Option<i64>, ApiError> {
        self.typed(key, "a whole number", Value::as_i64)
    }

    /// A number from `least` to `most`.
    pub(crate) fn count(
        &mut self,
        key: &str,
        least: u32,
        most: u32,
    ) -> Result<Option<u32>, ApiError> {
        let wanted = match most {
            u32::MAX => format!("a whole number of at least {least}"),
            most => format!("a whole number from {least} to {most}"),
        };
        let read = |value: &Value| {
            let number = u32::try_from(value.as_u64()?).ok()?;
            (least..=most).contains(&number).then_some(number)
        };
        self.typed(key, &wanted, read)
    }

    pub(crate) fn string(&mut self, key: &str) -> Result<Option<String>, ApiError> {
        self.typed(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A string that must be there.
    pub(crate) fn required(&mut self, key: &str) -> Result<String, ApiError> {
        self.string(key)?.ok_or_else(|| ApiError::missing(&self.name(key)))
    }

    pub(crate) fn list(&mut self, key: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(ApiError::value(&self.name(key), other, "a list")),
        }
    }

    /// A string, or a list of parts of which `read` makes texts, one to a line.
    pub(crate) fn texts(
        &mut self,
        key: &str,
        read: impl Fn(Self) -> Result<String, ApiError>,
    ) -> Result<Option<String>, ApiError> {
        let name = self.name(key);
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Array(parts)) => {
                let one = |(at, part)| read(Self::new(&format!("{name}[{at}]"), part)?);
                let texts: Result<Vec<_>, _> = parts.into_iter().enumerate().map(one).collect();
                Ok(Some(texts?.join("\n")))
            }
            Some(other) => Err(ApiError::value(&name, other, "a string or a list of parts")),
        }
    }

    pub(crate) fn object(&mut self, key: &str) -> Result<Option<Self>, ApiError> {
        let name = self.name(key);
        self.take(key).map(|value| Self::new(&name, value)).transpose()
    }

    /// Token ids; absent means none.
    pub(crate) fn token_ids(&mut self, key: &str) -> Result<Vec<u32>, ApiError> {
        let ids = self.list(key)?.unwrap_or_default();
        ids.iter().map(|id| token_id(&self.name(key), id)).collect()
    }

    /// A parameter of which only some values can be served, those that change nothing.
    pub(crate) fn only(&mut self, key: &str, served: &[Value]) -> Result<(), ApiError> {
        match self.take(key) {
            Some(value) if !served.contains(&value) => {
                let served: Vec<_> = served.iter().map(ToString::to_string).collect();
                let why = format!(" but as {}", served.join(" or "));
                Err(ApiError::unsupported(&self.name(key), &why))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what was not taken.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let left = self.map.keys().next();
        left.map_or(Ok(()), |key| Err(ApiError::unsupported(&self.name(key), " here")))
    }
}

/// A token id in the parameter `name`.
pub(crate) fn token_id(name: &str, value: &Value) -> Result<u32, ApiError> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| ApiError::invalid(name, format!("{name} contains {value}, no token id")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::new("", value).unwrap()
    }

    #[test]
    fn nulls_are_absent_and_what_is_left_is_refused() {
        let mut some = fields(json!({"a": null, "b": true, "c": 1}));
        assert_eq!(some.bool("a").unwrap(), None);
        assert_eq!(some.bool("b").unwrap(), Some(true));
        let error = some.finish().unwrap_err();
        assert_eq!((error.param.as_deref(), error.code), (Some("c"), "unsupported_parameter"));
    }

    #[test]
    fn a_wrong_type_names_the_parameter_and_what_it_must_be() {
        let value = || fields(json!({"o": {"x": "1"}}));
        let inner = |read: fn(&mut Fields) -> Option<ApiError>| {
            let mut inner = value().object("o").unwrap().unwrap();
            let error = read(&mut inner).unwrap();
            assert_eq!(error.param.as_deref(), Some("o.x"));
            error.message
        };
        assert_eq!(inner(|f| f.bool("x").err()), "o.x is \"1\"; it must be true or false");
        assert_eq!(inner(|f| f.f32("x").err()), "o.x is \"1\"; it must be a number");
        let count = "o.x is \"1\"; it must be a whole number from 0 to 20";
        assert_eq!(inner(|f| f.count("x", 0, 20).err()), count);
        assert_eq!(inner(|f| f.token_ids("x").err()), "o.x is \"1\"; it must be a list");
        assert_eq!(inner(|f| f.object("x").err()), "o.x is \"1\"; it must be an object");
        for (wrong, why) in [(json!([1, -1]), "-1"), (json!([1.5]), "1.5"), (json!(["a"]), "\"a\"")]
        {
            let error = fields(json!({"ids": wrong})).token_ids("ids").unwrap_err();
            assert_eq!(error.message, format!("ids contains {why}, no token id"));
        }
    }

    #[test]
    fn what_changes_nothing_is_accepted() {
        let served = [json!(1), json!("auto")];
        for fine in [json!({}), json!({"x": 1}), json!({"x": "auto"}), json!({"x": null})] {
            fields(fine).only("x", &served).unwrap();
        }
        let error = fields(json!({"x": 2})).only("x", &served).unwrap_err();
        assert_eq!(error.message, "x is not supported but as 1 or \"auto\"");
    }

    #[test]
    fn long_values_are_not_repeated_whole() {
        let long = "é".repeat(1000);
        let error = fields(json!({"x": long})).bool("x").unwrap_err();
        assert!(error.message.len() < 250, "{}", error.message);
        let error = fields(json!({long: 1})).finish().unwrap_err();
        assert!(error.param.unwrap().len() < 250);
    }
}

//! JSON schemas drawn at random, of every keyword that is supported and some nesting.

use serde_json::{Map, Value, json};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// The schema of a number.
pub(crate) fn schema(n: u64) -> Value {
    let mut random = Random(n.wrapping_mul(0x1234_5678_9abc_def1));
    let mut schema = match n % 4 {
        0 => any(&mut random, 3),
        1 => array(&mut random, 3),
        _ => object(&mut random, 3),
    };
    if n.is_multiple_of(5) {
        schema = json!({
            "type": "object",
            "properties": {"first": {"$ref": "#/$defs/part"}, "second": {"$ref": "#/$defs/part"}},
            "required": ["first"],
            "additionalProperties": false,
            "$defs": {"part": schema},
        });
    }
    schema
}

fn any(random: &mut Random, depth: u64) -> Value {
    let kinds = if depth > 0 { 14 } else { 9 };
    match random.below(kinds) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let least = random.below(2000) as i64 - 1000;
            json!({"type": "integer", "minimum": least, "maximum": least + random.below(500) as i64})
        }
        3 => json!({"type": "number", "exclusiveMinimum": -5, "maximum": random.below(50)}),
        4 => {
            let least = random.below(4);
            json!({"type": "string", "minLength": least, "maxLength": least + random.below(6)})
        }
        5 => json!({"enum": ["red", "ré\"d", 4, null, true, {"a": [1]}, -1.5]}),
        6 => json!({"const": ["x", random.below(9)]}),
        7 => json!({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}(/[a-f]+)?$"}),
        8 => {
            let formats = ["date", "time", "date-time", "uuid", "ipv4"];
            let format = formats[random.below(formats.len() as u64) as usize];
            json!({"type": "string", "format": format})
        }
        9 => json!({"anyOf": [any(random, depth - 1), any(random, depth - 1)]}),
        10 => json!({"type": ["integer", "null", "boolean"], "minimum": 0, "maximum": 99}),
        11 => array(random, depth),
        // Without a bound: most of these never end.
        12 if depth < 3 => json!({"type": "string"}),
        _ => object(random, depth),
    }
}

fn array(random: &mut Random, depth: u64) -> Value {
    let least = random.below(3);
    let most = least + random.below(3);
    let items = any(random, depth - 1);
    if random.below(3) == 0 {
        let first = any(random, depth - 1);
        return json!({"type": "array", "prefixItems": [first], "items": items, "maxItems": most + 1});
    }
    json!({"type": "array", "items": items, "minItems": least, "maxItems": most})
}

fn object(random: &mut Random, depth: u64) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for n in 0..1 + random.below(4) {
        let name = ["id", "name", "a \"b\"", "größe", "x"][n as usize].to_owned();
        if random.below(3) > 0 {
            required.push(name.clone());
        }
        properties.insert(name, any(random, depth - 1));
    }
    json!({
        "type": "object", "properties": properties, "required": required,
        "additionalProperties": false,
    })
}

//! An answer that goes on where the last message of the conversation ends.
//!
//! A template writes marks of its own behind a message, and may trim it; so the end of the text is
//! marked before rendering and looked for afterwards, as transformers does it.

use serde_json::Value as Json;

use super::refusal::Refusal;

/// Stands behind the last message's text while it is rendered. Nobody writes characters of the private
/// use area; the blank shows whether the template trims texts.
const MARK: &str = "\u{e0b7}\u{e0a7}\u{e0b7} ";

/// Marks where the text of the last of the messages ends. `field` names it, `text` is its text.
pub(super) fn mark(messages: &mut Json, field: &str, text: &str) -> Result<(), Refusal> {
    if text.trim().is_empty() {
        return Err(Refusal::wrong(field, format!("{field} has no text to go on from")));
    }
    let last = messages.as_array_mut().and_then(|messages| messages.last_mut());
    let last = last.expect("the message that goes on is here");
    last["content"] = format!("{text}{MARK}").into();
    Ok(())
}

/// Cuts a rendered conversation at the [`mark`].
pub(super) fn cut(mut rendered: String, field: &str) -> Result<String, Refusal> {
    let mut found = rendered.match_indices(MARK.trim_end());
    let (Some((at, _)), None) = (found.next(), found.next()) else {
        let what = "cannot be continued: the model's chat template drops its text";
        return Err(Refusal::wrong(field, format!("{field} {what}")));
    };
    let trims = !rendered[at..].starts_with(MARK);
    rendered.truncate(at);
    if trims {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(rendered)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As a template would write it, with marks of its own.
    fn rendered(text: &str, change: impl Fn(&str) -> String) -> Result<String, String> {
        let mut messages = json!([{"content": text}, {"content": text}]);
        let done = mark(&mut messages, "m", text).and_then(|()| {
            let write = |at: usize| change(messages[at]["content"].as_str().unwrap());
            cut(format!("<u>{}<|e|><a>{}<|e|>\n", write(0), write(1)), "m")
        });
        done.map_err(|error| error.to_string())
    }

    #[test]
    fn the_prompt_ends_with_the_last_words() {
        for text in ["a b", "<", "e", "|", " 1, 2, ", "<|e|>"] {
            let kept = rendered(text, str::to_owned).unwrap();
            assert_eq!(kept, format!("<u>{text}<|e|><a>{text}"));
            let trimmed = rendered(text, |text| text.trim().to_owned()).unwrap();
            assert_eq!(trimmed, format!("<u>{0}<|e|><a>{0}", text.trim()));
        }
        let without_thought = |text: &str| text.replace("<t>x</t>", "");
        assert_eq!(rendered("<t>x</t>so", without_thought).unwrap(), "<u>so<|e|><a>so");
    }

    #[test]
    fn what_cannot_be_continued_is_refused() {
        let said = rendered(" \n", str::to_owned).unwrap_err();
        assert!(said.starts_with("m has no text to go on from"), "{said}");
        for drops in [|_: &str| String::new(), |text: &str| format!("{text}{text}")] {
            let said = rendered("b", drops).unwrap_err();
            assert!(said.starts_with("m cannot be continued"), "{said}");
        }
    }
}

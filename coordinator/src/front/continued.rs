//! An answer that goes on where the last message of the conversation ends.

use super::refusal::Refusal;

/// Cuts a rendered conversation behind the text of its last message, where transformers cuts it for
/// `continue_final_message`. `field` names that message.
pub(super) fn cut(mut rendered: String, field: &str, text: &str) -> Result<String, Refusal> {
    let wrong = |what: &str| Err(Refusal::wrong(field, format!("{field} {what}")));
    let words = text.trim();
    if words.is_empty() {
        return wrong("has no text to go on from");
    }
    let Some(at) = rendered.rfind(words) else {
        return wrong("cannot be continued: the model's chat template changes its text");
    };
    // Many templates drop the blanks around a text.
    let whole = text.trim_start();
    let kept = if rendered[at..].starts_with(whole) { whole } else { words };
    rendered.truncate(at + kept.len());
    Ok(rendered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_ends_with_the_last_words() {
        for (rendered, text, expected) in [
            ("<u>a b<e><a>a b<e>\n", "a b", "<u>a b<e><a>a b"),
            ("<a>1, 2, <e>", " 1, 2, ", "<a>1, 2, "),
            ("<a>1, 2,<e>", " 1, 2, ", "<a>1, 2,"),
        ] {
            assert_eq!(cut(rendered.to_owned(), "m", text).unwrap(), expected);
        }
        for (rendered, text, said) in [
            ("<a><e>", " \n", "m has no text to go on from"),
            ("<a>A<e>", "b", "m cannot be continued"),
        ] {
            let error = cut(rendered.to_owned(), "m", text).unwrap_err().to_string();
            assert!(error.starts_with(said), "{error}");
        }
    }
}

//! Between text and tokens, for clients that want to know what a model will see.

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::tokenize_request::Input as Text;
use baton_proto::wire::v1::{
    DetokenizeRequest, DetokenizeResponse, GenerateRequest, TokenIds, TokenizeRequest,
    TokenizeResponse,
};

use super::Front;
use super::refusal::Refusal;

impl Front {
    /// Token ids of a text or of a conversation.
    pub(super) async fn token_ids(
        &self,
        request: TokenizeRequest,
    ) -> Result<TokenizeResponse, Refusal> {
        let input = request.input.map(|input| match input {
            Text::Prompt(text) => Input::Prompt(text),
            Text::Chat(chat) => Input::Chat(chat),
        });
        let request = GenerateRequest { model: request.model, input, ..GenerateRequest::default() };
        let (_, info, token_ids) = self.tokenize(request, true).await?;
        Ok(TokenizeResponse { token_ids, max_model_len: info.max_model_len, model: info.name })
    }

    /// The text of token ids.
    pub(super) async fn text_of(
        &self,
        request: DetokenizeRequest,
    ) -> Result<DetokenizeResponse, Refusal> {
        let DetokenizeRequest { model, token_ids, skip_special_tokens } = request;
        // Several models behind one name must agree on what the ids mean.
        let input = Some(Input::TokenIds(TokenIds::default()));
        let named = GenerateRequest { model, input, ..GenerateRequest::default() };
        let (model, info) = self.model_for(&named).await?;
        if let Some(id) = token_ids.iter().find(|&&id| id >= info.vocab_size) {
            let limit = format!("below the vocabulary size ({})", info.vocab_size);
            let what = format!("an id in token_ids is {id}; it must be {limit}");
            return Err(Refusal::wrong("token_ids", what));
        }
        let bytes = size_of_val(&*token_ids);
        let decoding = move || match skip_special_tokens.unwrap_or(true) {
            true => model.tokenizer.decode(&token_ids),
            false => model.tokenizer.decode_with_special(&token_ids),
        };
        Ok(DetokenizeResponse { text: self.computing.run(bytes, decoding).await? })
    }
}

use baton_kernels::cuda::{SAMPLED, resolve_tokens, testing};

use crate::support::Random;

#[test]
fn tokens_are_given_or_sampled() {
    testing::schedules(|stream| {
        let mut random = Random::new(5);
        let sampled: Vec<u32> = (0..70).map(|_| random.below(1 << 20) as u32).collect();
        let (mut sources, mut expected) = (Vec::new(), Vec::new());
        for _ in 0..600 {
            let number = random.below(sampled.len());
            if random.below(2) == 0 {
                sources.push(number as u32);
                expected.push(number as u32);
            } else {
                sources.push(number as u32 | SAMPLED);
                expected.push(sampled[number]);
            }
        }
        let [sources, sampled] = [&sources, &sampled].map(|v| stream.buffer(v).unwrap());
        let tokens = stream.buffer(&[u32::MAX; 600]).unwrap();
        resolve_tokens(stream, tokens.all(), sources.all(), sampled.all()).unwrap();
        assert_eq!(stream.read(tokens.all()).unwrap(), expected);
    });
}

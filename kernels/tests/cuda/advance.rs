//! Sequences go one token on.

use baton_kernels::cuda::{Histories, NO_POSITION, RowProgress, advance, testing};

use crate::support::{read, upload};

#[test]
fn rows_take_their_token_along() {
    testing::schedules(|stream| {
        let (stride, rows) = (4, 300);
        // Some rows pad the batch; every fifth history is full.
        let length = |row: usize| [2, 0, 3, 4, 1][row % 5];
        let lengths: Vec<u32> = (0..rows).map(length).collect();
        let tokens: Vec<u32> = (0..rows as u32).map(|row| 1000 + row).collect();
        let history_rows: Vec<u32> = (0..rows as u32).rev().collect();
        let positions = upload(stream, &vec![77_u32; rows]);
        let on_device = upload(stream, &lengths);
        let histories = upload(stream, &vec![5_u32; rows * stride]);
        let of_rows = upload(stream, &history_rows);
        let progress = RowProgress {
            positions: positions.all(),
            lengths: on_device.all(),
            histories: Some(Histories { tokens: histories.all(), stride, rows: of_rows.all() }),
        };
        advance(stream, &progress, upload(stream, &tokens).all()).unwrap();
        let (positions, after) = (read(stream, &positions), read(stream, &on_device));
        let histories = read(stream, &histories);
        for row in 0..rows {
            let padding = lengths[row] == 0;
            let (grown, position) = (lengths[row] + 1, lengths[row]);
            assert_eq!(after[row], if padding { 0 } else { grown });
            assert_eq!(positions[row], if padding { NO_POSITION } else { position });
            let mut want = vec![5; stride];
            if !padding && (position as usize) < stride {
                want[position as usize] = tokens[row];
            }
            assert_eq!(histories[(rows - 1 - row) * stride..][..stride], want, "row {row}");
        }
    });
}

#[test]
fn rows_without_histories_advance_too() {
    testing::schedules(|stream| {
        let (positions, lengths) = (upload(stream, &[0_u32; 2]), upload(stream, &[9_u32, 1]));
        let progress =
            RowProgress { positions: positions.all(), lengths: lengths.all(), histories: None };
        advance(stream, &progress, upload(stream, &[3_u32, 4]).all()).unwrap();
        assert_eq!((read(stream, &positions), read(stream, &lengths)), (vec![9, 1], vec![10, 2]));
    });
}

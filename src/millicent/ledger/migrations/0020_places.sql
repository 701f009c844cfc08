-- A cube of its own for what ran where: `work` has it, too, but with so many groups that the hours of a month are as
-- many sums as there were receipts. It begins as what `work` holds, added up.
INSERT INTO rollup_groups (cube, model, placement, status)
SELECT DISTINCT 'place', model, placement, status FROM rollup_groups WHERE cube = 'work';
INSERT INTO rollups
SELECT place.id, span_s, start_ns, sum(requests), sum(input_tokens), sum(output_tokens), sum(serving_ns),
    sum(cost_nanousd), sum(unpriced), sum(assumed), sum(unknown_usage), sum(priced), sum(rated), sum(useful),
    sum(unpriced_lines), sum(inference_nanousd), sum(retry_nanousd), sum(fallback_nanousd), sum(verification_nanousd),
    sum(retrieval_nanousd), sum(adjustment_nanousd)
FROM rollup_groups AS place
JOIN rollup_groups AS work USING (model, placement, status)
JOIN rollups ON grouped = work.id
WHERE place.cube = 'place' AND work.cube = 'work'
GROUP BY place.id, span_s, start_ns;

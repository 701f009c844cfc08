-- Cubes of their own for what ran where, and for features: `work` has both, too, but with so many groups that the hours of a
-- month are almost as many sums as there were receipts. They begin as what `work` holds, added up.
CREATE TEMP TABLE smaller AS SELECT 'place' AS cube, 0 AS by_feature, 1 AS by_place UNION ALL VALUES ('feature', 1, 0);
INSERT INTO rollup_groups (cube, feature, model, placement, status)
SELECT DISTINCT smaller.cube, iif(by_feature, feature, ''), iif(by_place, model, ''), iif(by_place, placement, ''), status
FROM smaller, rollup_groups AS work WHERE work.cube = 'work';
CREATE TEMP TABLE goes AS
SELECT work.id AS work, g.id AS smaller
FROM smaller
CROSS JOIN rollup_groups AS work ON work.cube = 'work'
CROSS JOIN rollup_groups AS g ON g.cube = smaller.cube AND g.user = '' AND g.feature = iif(by_feature, work.feature, '')
    AND g.model = iif(by_place, work.model, '') AND g.placement = iif(by_place, work.placement, '')
    AND g.status = work.status;
INSERT INTO rollups
SELECT smaller, span_s, start_ns, sum(requests), sum(input_tokens), sum(output_tokens), sum(serving_ns),
    sum(cost_nanousd), sum(unpriced), sum(assumed), sum(unknown_usage), sum(priced), sum(rated), sum(useful),
    sum(unpriced_lines), sum(inference_nanousd), sum(retry_nanousd), sum(fallback_nanousd), sum(verification_nanousd),
    sum(retrieval_nanousd), sum(adjustment_nanousd)
FROM goes CROSS JOIN rollups ON grouped = goes.work
GROUP BY smaller, span_s, start_ns;
DROP TABLE goes;
DROP TABLE smaller;

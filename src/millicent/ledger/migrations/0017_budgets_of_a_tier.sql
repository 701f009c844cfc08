-- A budget that counts only requests of one tier: each user of a plan, say.
ALTER TABLE budgets ADD COLUMN tier TEXT CHECK (tier IS NULL OR per IS NOT NULL AND per != 'tier');

-- Projects and tasks, for the users of users.sql. Loading this twice changes nothing.
INSERT INTO projects (id, name, description, created_at) VALUES
    (1, 'Website relaunch', 'New look for the public site, live before the spring fair.', '2025-01-07 08:30+00'),
    (2, 'Office move', 'Everything for the new rooms on Harbour Street.', '2025-01-07 08:40+00'),
    (3, 'Onboarding', 'What a new colleague needs in the first week.', '2025-01-08 10:15+00')
ON CONFLICT (id) DO NOTHING;

INSERT INTO tasks (id, project_id, title, created_by, created_at, done_at) VALUES
    (1, 1, 'Collect the texts of all departments', 1, '2025-01-07 08:45+00', '2025-01-14 15:20+00'),
    (2, 1, 'Choose photographs for the start page', 2, '2025-01-07 08:46+00', NULL),
    (3, 1, 'Check every page with a screen reader', 1, '2025-01-07 08:50+00', NULL),
    (4, 1, 'Redirect the old addresses', 2, '2025-01-09 11:00+00', NULL),
    (5, 2, 'Measure the meeting room', 2, '2025-01-07 09:00+00', '2025-01-10 12:00+00'),
    (6, 2, 'Order desks and lamps', 2, '2025-01-07 09:05+00', '2025-01-13 16:45+00'),
    (7, 2, 'Tell the post office the new address', 1, '2025-01-08 13:30+00', NULL),
    (8, 3, 'Write the welcome letter', 1, '2025-01-08 10:20+00', NULL),
    (9, 3, 'Make a list of accounts to open', 1, '2025-01-08 10:25+00', NULL)
ON CONFLICT (id) DO NOTHING;

SELECT setval(pg_get_serial_sequence('projects', 'id'), max(id)) FROM projects;
SELECT setval(pg_get_serial_sequence('tasks', 'id'), max(id)) FROM tasks;
